"""The routes, one router for each noun."""
