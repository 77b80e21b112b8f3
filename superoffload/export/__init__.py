"""Export a checkpoint as a Hugging Face model folder.

* weights: the weights, streamed from the rank files, written and verified
* files: everything beside the weights: configuration, tokenizer, model card
"""
