"""The processes that train: stages, trainer, weights of the terms, launchers, forecasts."""
