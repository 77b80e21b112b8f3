"""What both processes use: the arena, the messages, and pure arithmetic."""
