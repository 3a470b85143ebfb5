"""What each encoder did for an answer: reliance, Shapley values, benchmark."""
