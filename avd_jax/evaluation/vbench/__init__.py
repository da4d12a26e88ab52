"""VBench and VBench-2.0: what their tools expect of a folder of videos, and the arithmetic of their scores."""
