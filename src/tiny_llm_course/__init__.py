"""The tools of the course: starter files, test runs, hints, progress, and a check of the course itself.

They work on the syllabus and on Python source, and know nothing of attention, pages or requests, except in
`days/`. `syllabus.toml` is the only list of days. Learners use `pdm run start`, `test`, `hint` and so on.
"""
