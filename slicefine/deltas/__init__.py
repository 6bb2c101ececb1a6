"""Deltas: what a fine-tune has changed, kept in files, applied and taken back bit for bit, stored,
merged and exported.
"""
