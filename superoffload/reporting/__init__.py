"""What a person sees of a run while it trains, and of all runs.

* choice: which display a rank has
* display: what a display can do, and the one that shows nothing
* live: the display on a terminal
* panel: what it shows, drawn with rich
* picture: the same as an SVG file, for the documentation
* runs: the runs below a folder, and how far they are
* runs_table: a table of them
"""
