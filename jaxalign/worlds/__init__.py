"""Small worlds: texts, their true utility as a program, and readers who prefer them imperfectly.

`opinions` and `summaries` are functions of a seed; nothing is downloaded. Models of half a million parameters learn
them in minutes, which makes them the place to compare methods by what they really achieve. `sentiment` has everyday
requests for a pretrained model of real text, such as that of `smollm2`, and utilities by two lexicons.
"""
