"""Extension of DeepSpeed's SuperOffload: Adam in a process of its own, over memory that both sides share.

    install        puts the optimizer where DeepSpeed looks for it; what the application calls
    optimizer      the subclass of DeepSpeed's ZeRO-3 optimizer: which of its hooks mean what
    partitions     flat parameters and gradients that live in the shared memory
    gradients      the way of a gradient into it
    outside        reads and writes that do not come from training
    checkpointing  Adam state in and out of DeepSpeed's checkpoints
    coordinator    the trainer's side of a step: speculate, decide, collect, commit
    bookkeeping    what it notes
    process        the trainer's handle on the optimizer process: start, send, receive, notice its death
    pinning        page-locks what travels (CUDA)
    dispatch       hands work over once a device has delivered the gradients (CUDA)
    worker         the optimizer process: receive, compute, reply
    adam           Adam on one sub-group, from the same compiled op that ZeRO-Offload uses
    fused          a speculation in one pass over memory (fused.cpp)
    bias           which power of beta ZeRO-Offload would divide by
    messages       what crosses the process boundary
    state          the memory that both processes map
    affinity       which cores belong to whom (pure); binding applies it
    settings       what can be chosen beyond DeepSpeed's JSON
    contract       the private names of DeepSpeed that all of this leans on

Nothing here imports from the surrounding package.
"""
