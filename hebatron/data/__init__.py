"""Text into tokens: documents are read, normalised, compared, scored for difficulty and written as a hashed corpus."""
