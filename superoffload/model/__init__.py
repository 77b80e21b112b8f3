"""The model: its tokenizer, loading, attention and loss.

* tokenizer: the model's tokenizer; needs neither torch nor DeepSpeed
* architecture: a model without weights: positions, parameters that text does not reach
* quantization: quantized weights: dequantize or refuse
* weights: the files of the weights, compared with the architecture
* vocabulary: tokens against rows of the embedding; add rows
* load: the model, sharded as it loads; leaf modules
* leaf_modules: the modules that ZeRO-3 fetches as a whole
* attention: the attention kernel; packs attended to document by document
* flash_cpu: the same on the CPU, with faster gradients
* isolation: whether a model keeps packed documents apart, tested when a run starts
* head: the loss of the output head, summed over target tokens
* flops: model shape and row lengths -> FLOPs
"""
