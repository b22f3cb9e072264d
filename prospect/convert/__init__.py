"""Other people's data as clips and embeddings; `python -m prospect.convert`."""
