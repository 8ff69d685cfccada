"""Tasks: a pretrained encoder with a head, trained with labels or masks through the same rounds as pretraining."""
