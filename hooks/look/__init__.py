"""A look at every module of a running model: what mixes tokens unread, and what keys are. Modules are run again."""
