"""Stage 1 of ``prepare``: documents become token stores. From the outside in:

token_stores         the stores of all sources: text, then duplicates, then needles
corpus_tokenizer     trained on the sources, or copied
text_source          one source: finished token shards are reused or refused, the rest is tokenised
split_scheduler      which input splits count under a source's limits
workers              a pool of processes
tokenize_split       one input split -> two token shards, in a worker process
tokenizer_backend    Hugging Face's tokenizers or gigatoken
manifest_writer      makes finished token shards count
sources              the kinds of sources: source_kinds (folder, stdlib, custom), hub, needle_source
find_files           which files a folder holds
formats, tables      files -> input splits -> records
records              a record -> a document, or a broken record
broken_share         whether too much of a source is lost
decontaminate, deduplicate    documents that are left out
"""
