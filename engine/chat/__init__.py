"""Talking to a model: in the terminal, and on a page.

chat_model: ChatModel, turns in and the text of an answer out; AnswerSettings, how it is sampled.
conversation: Conversation, the one in the terminal. answer_queue: AnswerQueue, which computes
answers to several readers. server: ChatServer, which serves page.html.
It imports ground files and generation.
"""
