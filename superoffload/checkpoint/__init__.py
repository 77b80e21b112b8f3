"""Checkpoints: their format, and saving, resuming, converting and reading them.

* manifest: the format: file names, marker files, checksums; what makes a checkpoint complete
* output_folder: the folder of a run: created, writable, used by one run at a time
* folder_lock: its lock
* save: write a checkpoint: complete or absent
* resume: find an intact checkpoint, compare the settings, restore
* convert: a checkpoint for any number of ranks
* rank_files: read a checkpoint's tensors without a run, one at a time
"""
