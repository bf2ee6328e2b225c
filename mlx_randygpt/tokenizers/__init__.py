"""Tokenizers: characters, byte-level BPE and WordPiece."""
