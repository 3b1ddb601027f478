"""The page and the HTTP API, over the same pipelines: `ldm serve` (extra `web`).

job.py          what is asked for, how far it is, and what came of it
jobs.py         the queue: one job at a time a device, equal-shaped ones together, within a bound
runs.py         jobs on the device, batch by batch
views.py        previews, and the views for those who study the model
form.py         the fields of a request, their defaults and ranges, in one place for the page and the API
images_api.py   /v1: the form's own fields, and jobs
a1111.py        /sdapi/v1, as clients of AUTOMATIC1111's interface call it; a1111_facts.py what they ask about, and
                a1111_pictures.py their ways with pictures and masks
page/           the page: its fields in __init__.py, the brush and the gallery in JavaScript; allowed.py what of gradio is open
guard.py        what may not pass: other hosts, other origins, missing tokens, large and slow bodies
refusals.py     what a malformed request is answered
server.py       all of it in one application
"""
