"""Training data: text, JSONL or token shards, tokenised, cut into windows, shuffled and mixed, alike for every layout.

`streams` reads files into token streams, `tokens` makes tokens of text and text of tokens, `shards` is the file format
of tokens, `corpus` says which window sequence number i of a run is, and `prefetch` reads ahead.
"""

from training.data.corpus import Batch, Corpus, open_corpus
from training.data.prefetch import Prefetcher
from training.data.shards import write_token_shard
from training.data.tokens import Tokenizer, open_tokenizer, train_bpe

__all__ = [
    "Batch",
    "Corpus",
    "Prefetcher",
    "Tokenizer",
    "open_corpus",
    "open_tokenizer",
    "train_bpe",
    "write_token_shard",
]
