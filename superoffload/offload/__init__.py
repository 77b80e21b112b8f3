"""SuperOffload: Adam in a process of its own, over memory that it shares with the trainer.

DeepSpeed's ZeRO-3 splits the parameters into sub-groups and keeps their fp32 masters and Adam moments on the host;
this package moves the work on them to a second process, so that it overlaps with backward and forward.

        trainer process                                           optimizer process
    +---------------------------+                             +-------------------------+
    | forward, backward, step() |  SPECULATE, DECIDE, STEP,   | worker.py: takes tasks, |
    | zero3/    DeepSpeed hooks | --------------------------> | one after another       |
    | trainer/  coordinator     |  COMMIT, CANCEL, DROP       | adam.py:  DeepSpeed's   |
    |                           | <-------------------------- | compiled cpu_adam;      |
    |                           |  SPECULATED, STEPPED,       | fused.cpp: one pass     |
    +---------------------------+  COMMITTED, VOID, ERROR     +-------------------------+
          |              ^             (socket)                   ^               |
          | gradients    | new weights                            | G, P, M, V    | S; P, M, V
          v              |                                        |               v
    +-----------------------------------------------------------------------------------+
    | arena: one memfd mapped by both processes. For every sub-group: master parameters |
    | P, gradients G, Adam moments M and V (fp32), new low-precision weights S (bf16)   |
    +-----------------------------------------------------------------------------------+

1. A *round* is everything between two optimizer steps.
2. In the last backward of a round DeepSpeed reduces gradients bucket by bucket, and `HostGradients` writes each into
   region G of its sub-group.
3. Once all gradients of a sub-group have arrived, the coordinator sends SPECULATE: the optimizer process reads P, G, M
   and V, computes the weights after this step as if no gradient needed clipping, and writes S and nothing else.
4. No tensor crosses the socket: a message names a sub-group and carries the step, the hyper-parameters and the factor.
5. `step()` computes the norm over all ranks and sends DECIDE with the factor by which the gradients are to be scaled.
6. A speculation with that factor is accepted: the trainer uploads S to the device, and the optimizer process repeats
   the update in place, on P, M and V (COMMIT), while the next forward runs.
7. Otherwise the sub-group is stepped in place with the right factor (STEP), and S is uploaded then. The first
   sub-group of the next forward comes first.
8. On overflow, NaN or a dropped batch nothing has to be undone, because a speculation has changed no state.
9. The next boundary backward waits, for each sub-group, until its COMMIT no longer reads G; readers from outside
   (checkpoints, DeepSpeed's accessors) wait for all commits.
10. If either process dies, the other sees the end of the socket: the trainer raises, the optimizer process exits.

On a GPU, a stream of its own carries all copies between device and arena. Gradients are copied while backward
continues; the next forward waits, at the gather of each parameter, for the upload of that parameter's sub-group only.

The subpackages, in dependency order (shared -> worker | trainer -> zero3 -> install):

    shared/      the arena's layout, the messages, and pure arithmetic that both processes use
    worker/      the optimizer process: receive a task, compute, reply
    trainer/     the trainer's side: what to ask and when, the process handle, cores, page-locking; no DeepSpeed
    zero3/       the subclass of DeepSpeed's ZeRO-3 optimizer; the only place that touches its private names
    install.py   puts that subclass where DeepSpeed looks for it; settings.py holds the choices

Nothing here imports from the surrounding package.
"""
