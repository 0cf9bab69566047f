"""What is promised to clients, what it costs, and what has been spent; start with README.md beside this file."""
