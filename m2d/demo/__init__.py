"""The demo: a corpus that every installation has, and a teacher trained on it from nothing.

corpus     the documents and their split; needs no torch
teacher    tokenizer, model, training, measuring
baselines  n-gram models on the same tokens, to compare the teacher with
"""
