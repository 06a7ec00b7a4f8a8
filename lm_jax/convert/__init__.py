"""Models of others <-> ours, as tables. The command is `python tools/convert_checkpoint.py`.

config_reader.py   a config.json read by name and type; what nobody here understands is refused
config_fields.py   fields of config.json files: how each is read and how it is written, described once
rotary.py          rotary positions among them
families.py        GPT-2, Llama and what came after: tensors and config fields of each, a table a family
encoders.py        the same of BERT, RoBERTa, DistilBERT and T5
heads.py           heads of tasks: their classes there, the names of labels
description.py     a model without its arrays: config.json <-> config, by these tables
tensor_map.py      tensors <-> parameters, by these tables, slice by slice
safetensors.py     the file format of tensors, read without trust
hugging_face.py    a whole folder, read onto a mesh and written
gguf.py            GGUF files of the Llama family
tokenizer_json.py  SentencePiece, or plain bytes, as a tokenizer.json
text_files.py      the files of a folder that say what its text is
proof.py           the same logits and texts here and in another library
transformers_peer.py  that library: `transformers`
export.py          a MODEL on its way out, proven before its arrays are written
of_run.py          a finished run on its way out, by a process of its own
run.py             parameters from elsewhere as a run at step 0
word_vectors.py    word2vec and GloVe files -> rows of an embedding table (the core reads these)
"""
