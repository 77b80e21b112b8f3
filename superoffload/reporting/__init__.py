"""What a person sees of a run while it trains.

* display: which display a rank has, and the one that shows nothing
* live: the display on a terminal
* panel: what it shows, drawn with rich
* picture: the same as an SVG file, for the documentation
"""
