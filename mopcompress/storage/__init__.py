"""Files of a run that are no model format: whole folders, the cache, resumable work, mapped tensors."""
