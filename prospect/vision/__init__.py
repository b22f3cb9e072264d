"""Pictures to frame embeddings, an optional extra (requirements-vision.txt)."""

from prospect.vision.tower import load_vision_encoder as load_vision_encoder
