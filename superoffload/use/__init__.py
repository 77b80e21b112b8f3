"""Use a finished model: talk to it, and measure it on held-out rows.

* finished: find and load it: a model folder, a hub id, a checkpoint, or the newest checkpoint of a run
* device: where to compute
* speaker: prompts and turns -> answers, in the template of training
* dialogue: a conversation on the terminal, or answers to prompts of a script
* held_out: the loss of data sets
"""
