"""Log-probs of packed trees, scoring, the train step, and what a step costs."""
