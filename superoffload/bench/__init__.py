"""What a machine reaches, and where the time of a step goes: configurations side by side.

* grid: flags with several values -> configurations, and their names
* subject: the model, and what each process sets up
* documents: rows of random tokens, as long as Alpaca's
* worker: one rank of one configuration, a process
* alternatives: DeepSpeed's own SuperOffload on the CPU
* ruler: the machine's rate of matrix products, a process
* channel: what both answer, and how
* player: the processes of one configuration, as the parent sees them
* rounds: let the configurations take turns
* fit: whether all of them fit into memory together
* report: all of it, as bench.json has it: medians, and ratios with their spread
* compare: what became faster or slower since another benchmark; pure
* tables: the report in Markdown; pure
* picture: where the time goes, as a picture
"""
