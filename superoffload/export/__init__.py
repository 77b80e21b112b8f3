"""Export a checkpoint as a Hugging Face model folder.

* weights: the weights, streamed from the rank files, written and verified
* files: everything except the weights: configuration, tokenizer, model card
* picture: the curve of the loss on the card
* push: upload an export to the hub
"""
