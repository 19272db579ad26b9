"""The engine that samples responses: slots, pages of the cache, token sampling, decode steps, files of responses."""
