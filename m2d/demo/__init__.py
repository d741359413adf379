"""The demo: a corpus that every installation has, and a teacher trained on it from nothing.

corpus     the documents and their split; needs no torch
teacher    tokenizer, model, training
measure    the teacher's perplexity and its use of its experts
baselines  n-gram models on the same tokens, to compare the teacher with
"""
