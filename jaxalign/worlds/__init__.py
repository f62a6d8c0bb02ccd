"""Embedded worlds: tasks with prompts, preferences and a gold reward, made by a program."""
