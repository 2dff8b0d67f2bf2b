"""A stay as PhysioNet 2012 has it: descriptors, a repeated one, values that mean nothing, the last minute."""

STAY = """Time,Parameter,Value
00:00,RecordID,{record}
00:00,Age,54
00:00,Gender,0
00:00,Height,-1
00:00,ICUType,4
00:00,Weight,72.5
00:07,GCS,15
00:07,HR,73
01:30,Weight,73
01:30,Weight,-1
01:31,,2.9
47:59,pH,735
48:00,DiasABP,-1
"""
