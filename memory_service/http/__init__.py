"""The routes of the memory service and what every call passes through."""
