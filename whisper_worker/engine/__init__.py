"""From features to tokens to a transcript."""
