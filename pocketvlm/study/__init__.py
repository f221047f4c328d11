"""Studies: one run's configuration in named rows, several seeds each, compared in pairs (`pocketvlm ablate`)."""
