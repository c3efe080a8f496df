"""Making avatars: the model-agnostic DeepSpeed trainer, its tasks, and the per-subject fits."""
