"""PROSPECT: a proactive, streaming video assistant that tracks the state of the task it watches."""
