"""Pages to look at: a streamed clip, a clip as it is trained on, training curves. See __main__.py."""
