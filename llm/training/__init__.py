"""One optimizer step, the loop around it, and the evaluation beside it."""
