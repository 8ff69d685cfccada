"""Public data sets as their publishers hand them out, made ready for `data=folder` and `data=multimodal`."""
