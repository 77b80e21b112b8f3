"""The model: its tokenizer, loading, attention and loss.

* tokenizer: the model's tokenizer; needs neither torch nor DeepSpeed
* load: the model, sharded as it loads; leaf modules
* attention: the attention kernel; packs attended to document by document
* isolation: whether a model keeps packed documents apart, tested when a run starts
* head: the loss of the output head, summed over target tokens
* flops: model shape and row lengths -> FLOPs
"""
