"""What a person sees of a run while it trains.

* choice: which display a rank has
* display: what a display can do, and the one that shows nothing
* live: the display on a terminal
* panel: what it shows, drawn with rich
* picture: the same as an SVG file, for the documentation
"""
