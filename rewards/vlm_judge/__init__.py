"""A vision-language model as a judge of edits: a prompt, a transport that carries it, a parser of the answer."""
