"""Folders in the form of Hugging Face: configs, tensors, adapters."""
