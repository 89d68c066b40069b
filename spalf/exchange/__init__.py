"""Dictionaries to and from other libraries, by their files alone: none of those libraries is imported.

`dictionary` is the form between, and each format a module that reads it, writes it, or both; `verbs` is what the
command line does. All but `verbs` and `adopt` import with attrs, torch and safetensors alone, for `saebench` runs
beside versions of other libraries that spalf does not install with.
"""
