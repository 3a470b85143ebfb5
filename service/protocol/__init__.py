"""Wire formats as pydantic models. They know JSON and limits, and nothing of the model behind them."""
