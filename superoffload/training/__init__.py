"""One run: its engine, steps, numbers, evaluation and run control.

* progress: how far a run has come, and how its last save ended
* schedule: the learning rate of each step
* engine: optimizer, schedule and DeepSpeed's engine
* step: what one optimizer step holds, counted over all ranks
* metrics: the numbers of a step and the summary of a run
* step_parts: where the time of a step goes
* source_losses: the loss of each source
* tracking, trackers/: metrics.jsonl, and what `--report_to` names
* evaluation: held-out loss, and answers to prompts
* run_control: stop and save on demand: signals, save_now, the clock
* run: what belongs to one run, its checkpoint and its export
"""
