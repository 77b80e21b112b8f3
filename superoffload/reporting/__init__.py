"""What a person sees of a run: the display while it trains, the report afterwards, and of all runs.

* choice: which display a rank has
* display: what a display can do, and the one that shows nothing
* live: the display on a terminal
* panel: what it shows, drawn with rich
* picture: the same as an SVG file, for the documentation
* recorder: run.json at the start of a run, its report at the end
* records: what the output folder of a run holds
* charts, curves: series of numbers as charts; which ones of a run are drawn
* report, page/: the report of a run, and its template
* comparison: the curves of several runs, drawn with matplotlib
* example: the picture of the report, for the documentation
* runs: the runs below a folder, and how far they are
* runs_table: a table of them
"""
