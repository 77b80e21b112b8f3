"""From the rows of a data set to the batches of each step.

* sources: a hub id, a folder or a file -> rows
* formats: rows of every known format -> prompt and answer, or messages
* template, skeleton, chat: the assistant's turns in the text of a chat template
* encode: a conversation -> input_ids and labels
* cache, rows: tokenise once per machine; the tokenised rows on disk
* packing: lengths -> packs, best-fit decreasing
* collate: packs -> the tensors of a micro-batch
* loader: the batches of each step, a function of (seed, epoch)
* statistics: the figures of a data set
* preview: rows as the model will see them
"""
