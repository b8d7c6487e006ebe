#!/usr/bin/env python3
"""Make a seeded corpus of English sentence pairs with graded similarity, without any download.

A scene (who does what to what, where and when; a cause and its effect; a comparison; a definition) is
sampled from topic lexicons whose slots fit each other, then put into words. Two wordings of one scene are
a positive pair; a wording of an edited scene is a hard negative or a lower grade.
"""
from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import io
import json
import os
import random
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

VERSION = 1
EVAL_ROWS = {"dev": 1500, "test": 1379}
FILES = {"train": "train/generated.jsonl.gz", "dev": "sts/generated-dev.tsv.gz",
         "test": "sts/generated-test.tsv.gz"}
RECORD = "generated.json"

# who/it: people/other agents @ places @ the only past times, if given; do: verb/opposite > objects [adjectives];
# kit: things to count or hand over; cmp: things : qualities; def: term = meaning; why: cause => effect.
# "a|b" are synonyms, "<a/b>" is a choice that changes the meaning, "*be" and "+be" are singular and plural verbs.
# Noun marks: ~ mass, ^ plural only, ! always "the", * a person. In an open topic anybody may act.
LEXICON = """
# cooking open
who chef|cook, baker, kitchen assistant|kitchen helper @ in the kitchen, at the restaurant, in the school cafeteria
do chop|cut up > onion, carrot, mushroom [large|big, fresh]; peel > potato, apple, orange [small|little, ripe];
  bake/burn > cake, pie, loaf of bread [large|big, small|little]; boil > egg, potato, rice~, pasta~; grill/freeze >
  steak, sausage, chicken breast; serve > salad, dessert, soup~; wash|clean > plate, pan, glass [dirty]
kit wooden spoon, knife, mixing bowl, cookbook|recipe book, cutting board|chopping board
cmp soup, stew, curry, sauce : spicy, salty, thick, hot, tasty
def whisk = a kitchen tool for beating eggs; recipe = a list of steps for making a dish; dough~ = a mix of flour and
  water
why the <oven/grill> *be too hot => the <bread/pie/pizza> *burn; the <soup/sauce> *be too salty => the guests +complain;
  the <cream/milk> *stand in the sun => the dessert *spoil; the dough *be too dry => the <cake/bread> *fall apart
# sport open
who player, team captain, young athlete, goalkeeper|goalie @ in the stadium|at the stadium, at the sports club, in the
  park
do kick/catch > ball, penalty; win/lose > match|game, race, tournament|competition [important, difficult|hard]; break >
  world record, club record, school record; lift|raise/drop > trophy, weight, silver cup [heavy]; ride > bicycle|bike,
  horse, mountain bike; run > around the track, along the river, up the hill
kit ball, helmet, tennis racket, whistle, medal, stopwatch
cmp home team, visiting team|guest team, youth team, national team : strong, fast, experienced, successful, popular
def marathon = a run of about 42 kilometers; referee = a person who makes sure that players follow the rules
why the <field/track/court> *be too wet => the <match/race> *be canceled; the <captain/striker> *be injured => the team
  *lose the final; the players +train every day => the team *become stronger; the coach *arrive late => the game *start
  late
# weather
it storm, hurricane, tornado|twister, flood @ in the north of the country, near the coast, in the valley, in the city
do destroy|wreck/spare > house, bridge, barn [old, wooden]; damage > roof, car, fence, power line; hit|strike/miss >
  town, village, island [small|little]; block > road, tunnel, railway line; sweep away|carry away > boat, tree, wooden
  hut
who weather forecaster|meteorologist, scientist @ at the weather station, on the mountain, at the airport
do predict|forecast > storm, heat wave, thunderstorm, cold spell [severe|violent, sudden]; publish > weather report,
  storm warning; measure > temperature!, wind speed!; repair|fix/break > rain gauge, thermometer, satellite dish
kit umbrella, raincoat, thermometer, weather map, sandbag
cmp morning, afternoon, evening, night : warm, wet, windy, cloudy, cold
def drought = a long time without rain; humidity~ = the amount of water in the air; blizzard = a storm with a lot of
  snow
why the temperature *fall below zero => the <lake/pond/river> *freeze; the wind *get stronger => the <ferry/flight> *be
  canceled; the <rain/storm> *last all night => the river *flood the <fields/village>; the sun *come out => the snow
  *melt
# medicine
who doctor|physician, nurse, medical student @ in the hospital|at the hospital, at the clinic, in the emergency room
do treat|care for > patient*, child*, soldier* [sick|ill, injured|hurt]; examine|check > patient*, X-ray, eye, knee;
  clean|disinfect > wound, cut, needle [small|little, deep]; calm|reassure/frighten|scare > patient*, visitor*, boy*
  [nervous|anxious]; order/cancel > blood test, operation|surgery, checkup; bandage > wound, arm, ankle [swollen]
kit syringe, bandage, wheelchair, stethoscope, blanket
cmp tablet|pill, syrup, injection, new treatment : effective, expensive, safe, strong
def fever = a body temperature above normal; surgeon = a doctor who performs operations; pharmacy = a shop for medicines
why the <patient/child> *have a high fever => the <doctor/nurse> *prescribe medicine; the <wound/cut> *become infected
  => the doctor *prescribe antibiotics; the <boy/girl> *eat too much candy => the dentist *find a cavity
# travel open
who tourist, traveler, tour guide, backpacker @ in Rome, in Japan, at the airport, in the old town
do visit > museum, castle, temple, market [famous|well-known, ancient]; book|reserve/cancel > hotel room, flight, boat
  trip [cheap|inexpensive]; pack/unpack > suitcase, backpack, bag [large|big, heavy]; catch/miss > train, bus, ferry;
  photograph > statue, bridge, tower [beautiful|lovely]; rent|hire/return > car, boat, scooter; find/lose > passport,
  map
kit map, guidebook|travel guide, suitcase, passport, ticket, camera
cmp hotel, hostel, campsite, guesthouse : expensive, comfortable, clean, quiet, modern
def hostel = a cheap place where travelers sleep; visa = a permit to enter a country; souvenir = a reminder of a trip
why the <train/bus/ferry> *be late => the <tourists/students> +miss the flight; the <hotel/hostel> *be full => the
  travelers +sleep in a tent; the <woman/man> *lose the passport => the trip *end early
# law
who judge, magistrate @ in court|in the courtroom, in the capital
do dismiss|reject/accept > appeal, claim, complaint; overturn|reverse/uphold|confirm > verdict, conviction, sentence;
  postpone|delay > hearing, trial [important]; question > witness*, expert*; release|free/jail|imprison > suspect*,
  hacker*
who police officer, detective @ near the station, in the old town, at the harbor
do arrest|detain/release|set free > thief*, suspect*, burglar* [dangerous]; question|interview > witness*, driver*;
  search > house, car, office, warehouse [empty]; find|discover > weapon, fingerprint, stolen car, clue
kit contract, court order, law book, police badge
cmp first trial, second trial, civil case, criminal case : long, complicated, expensive, interesting
def witness = a person who saw a crime; verdict = the decision of a jury; contract = an agreement between two parties
why the <witness/expert> *change the story => the judge *stop the trial; the <lawyer/prosecutor> *be sick => the hearing
  *be postponed; the <thief/burglar> *leave fingerprints => the police +solve the case
# software open
who programmer|developer, software engineer, intern, data scientist @ at the office, at home, on the test server
do fix|repair/cause > bug, memory leak, crash [serious, strange|odd]; write/delete|remove > script, function, unit test
  [short, simple]; install/uninstall > program, driver, plug-in [new]; restart|reboot/shut down > server, computer,
  database [slow, old]; update|upgrade > website, library, app; review/ignore > patch, pull request, design document
kit laptop, keyboard, monitor|screen, USB stick, charger, user manual
cmp new version, old version, mobile app, desktop program : fast, stable, secure, easy to use, popular
def compiler = a program that turns source code into machine code; bug = a mistake in a program; server = a computer
  that answers requests from other computers; password = a secret word that opens an account
why the <server/database> *be overloaded => the <website/app> *crash; the <password/key> *be too short => the account
  *be hacked; the <disk/memory> *be full => the program *stop; the <test/build> *fail => the team *delay the release
# animals
it dog, cat, fox, wolf @ in the forest|in the woods, on the farm, in the park
do chase > rabbit, squirrel, duck, mouse [small|little, white]; sleep > under a tree, in the sun, on the grass; run >
  across the field, through the forest|through the woods, along the beach; jump > over the fence, over the wall, into
  the water; bury/dig up > bone, toy, shoe [old]; watch|observe > bird, deer, hedgehog
who zookeeper, vet|veterinarian, farmer @ at the zoo, in the stable, at the animal shelter
do feed > elephant, monkey, penguin, goat [hungry, young]; weigh > lion cub, puppy, kitten, turtle; wash|clean > pony,
  donkey [dirty]; rescue|save > bird, horse, kitten [injured|hurt]; catch/release|set free > snake, parrot, raccoon
kit leash, water bowl, cage, blanket, bag of dog food
cmp elephant, horse, wolf, rabbit : fast, heavy, strong, shy, intelligent
def predator = an animal that hunts other animals; puppy = a young dog; nest = a place where birds lay their eggs
why the <dog/puppy> *hear a loud noise => the <cat/chicken/rabbit> *run away; the <gate/cage> *be open => the
  <monkey/goat> *escape; the winter *be very cold => the <birds/bears> +move to the south
# music open
who musician, music student, street performer, music teacher @ on the stage|on stage, in the studio, at the festival
do play > guitar, violin, piano, trumpet [old, expensive|costly]; write|compose > song, melody, opera [short, sad];
  record/delete > album, song, drum solo [new]; tune > guitar, harp, cello; sing > song, lullaby, folk song
  [cheerful|happy]; buy|purchase/sell > drum, flute, amplifier [old, small|little]
kit guitar, microphone, music stand, violin, loudspeaker|speaker, songbook
cmp trumpet, violin, drum, piano : loud, expensive, heavy, popular, difficult to play
def orchestra = a large group of musicians with different instruments; choir = a group of people who sing together
why the <singer/pianist> *be sick => the concert *be canceled; the <guitar/violin> *be out of tune => the song *sound
  terrible; the <band/choir> *practice every evening => the audience *enjoy the concert
# finance
it bank, insurance company|insurer, investment fund @ in Europe, in the city, in Asia
do raise|increase/lower|reduce > fee, interest rate, price; buy|purchase/sell > office building, bond
  [expensive|costly]; approve/reject|turn down > loan, application, mortgage [large|big]; open/close|shut > branch, call
  center [new]
who accountant, investor, customer, shop owner @ at the bank, in the office, in town
do pay|settle > bill, invoice, fine [large|big]; check > bank statement, receipt, account; sell/buy|purchase > share,
  apartment|flat, gold coin; sign/tear up > check, contract, loan agreement
kit check, credit card, gold coin, invoice, receipt
cmp first loan, second loan, savings plan, pension fund : expensive, safe, risky, profitable
def inflation~ = a general rise in prices; mortgage = a loan for buying a house; budget = a plan for spending money
why the <price of oil/interest rate> *rise => the <tickets/houses> +become more expensive; the <company/bank> *make a
  loss => the share price *fall; the <government/city> *lower taxes => the shops +sell more
# school open
who teacher, professor, tutor @ at school|in school, in the classroom, at the university
do explain > rule, theorem, poem [difficult|hard]; grade|mark/lose > test, essay, exam [long, short]; praise/punish >
  class, student*, child* [quiet]; prepare/cancel > lesson, field trip, lecture; correct > mistake, spelling error
who student|pupil, girl, boy @ at school|in school, in the library, at home
do pass/fail > exam, test, quiz [important]; finish|complete/start|begin > project, essay, worksheet [long, short];
  solve > equation, puzzle, math problem [tricky]; borrow/return > book, dictionary, calculator; learn/forget > poem,
  song, formula
kit textbook, ruler, pencil case, notebook|exercise book, dictionary, calculator
cmp math test, history exam, physics course, English class : difficult, long, interesting, popular
def noun = a name for a person or a thing; semester = half of a school year; scholarship = money that pays for school
why the <teacher/professor> *be sick => the <lesson/exam> *be canceled; the <boy/girl> *study hard => the exam *be easy;
  the <bus/train> *break down => the children +be late for school; the library *be noisy => the students +go outside
# gardening open
who gardener, neighbor, landscaper @ in the garden, behind the house, in the greenhouse
do plant/dig up > tree, rose bush, tulip, tomato plant [small|little, young]; water > flower, plant, herb [dry];
  prune|trim > hedge, apple tree, vine [tall, old]; pick/throw away > tomato, strawberry, pear, cucumber [ripe]; mow|cut
  > lawn!, meadow; remove|pull out > weed, bush, root [dead, thick]; build > shed, compost bin, fence
kit shovel|spade, watering can, rake, flowerpot, pair of gloves, wheelbarrow
cmp oak, rose bush, apple tree, hedge : tall, old, thick, healthy
def greenhouse = a glass building for growing plants; weed = a wild plant that nobody wants; compost~ = rotted plant
  material
why the <summer/spring> *be very dry => the <flowers/roses/tomatoes> +die; the <rabbit/snail> *find the garden => the
  lettuce *disappear; the <soil/ground> *be frozen => the gardener *wait until March
# history
who king, queen, emperor, duke @ in the north, near the border, in the east @ in the 12th century, in 1450, after the
  war, long ago|a very long time ago, in ancient times|in antiquity
do conquer|capture/lose > city, fortress, island [rich|wealthy]; build/destroy > castle, temple, palace [large|big];
  sign/break > treaty, peace agreement; free|release/execute > prisoner*, rebel*, knight*; found > university, monastery
who archaeologist, historian, museum director @ near the river, in Egypt, under the old church
do discover|find > tomb, coin, sword, skeleton [ancient, Roman]; study > map, letter, manuscript [old, rare]; translate
  > inscription, scroll, diary; restore|repair/damage > vase, mosaic, statue [ancient]
kit ancient coin, old map, bronze sword, clay pot, stone tablet
cmp castle, cathedral, temple, palace : old, large, tall, famous
def treaty = an agreement between countries; emperor = the ruler of an empire; moat = a deep ditch around a castle
why the <harvest/winter> *be terrible => the people +rise against the king; the <king/queen> *die without an heir => a
  civil war *begin; the <army/fleet> *be too weak => the <city/island> *fall
# physics
who physicist, researcher|scientist, lab assistant @ in the laboratory|in the lab, at the university, at the research
  center
do measure > voltage!, pressure!, weight!; heat/cool > liquid, gas, metal rod [cold]; test > theory, hypothesis,
  prototype [new, simple]; repeat|redo/cancel > experiment, measurement [important]; observe|watch > particle, chemical
  reaction, magnetic field [strange|odd]; build/take apart > laser, telescope, detector [small|little]; publish >
  article, study
kit microscope, magnet, lens, battery, test tube
cmp copper wire, iron bar, glass plate, plastic tube : heavy, thick, warm, strong, long
def gravity~ = the force that pulls objects toward the earth; magnet = an object that attracts iron; vacuum = an empty
  space
why the <metal/wire> *get hot => the <rod/bar/rail> *expand; the <water/liquid> *boil => the steam *lift the lid; the
  <magnet/battery> *be too weak => the motor *stop; the <lens/mirror> *be dirty => the image *become blurred
# family open
who mother|mom, father|dad, aunt, babysitter @ at home, in the living room, at the playground
do feed > baby*, toddler*, cat [hungry]; comfort|console/scold > child*, boy*, girl* [sad|unhappy]; read > story,
  letter, fairy tale [long, funny]; hide/find > key, present|gift, toy [small|little]; wash/lose > blanket, sweater,
  sock [warm]; plan|organize/cancel > birthday party, picnic, family trip; hug > baby*, grandmother*, friend*
kit present|gift, toy, photo album, teddy bear, birthday card
cmp older brother, younger sister, uncle, cousin : tall, shy, patient, funny
def nephew = the son of a brother or a sister; orphan = a child without parents; twins^ = two children of the same birth
why the <baby/boy/girl> *be hungry => the <mother/father> *make dinner; the <dog/thunder> *wake the baby => the parents
  +get no sleep; the <grandmother/uncle> *come to visit => the children +be happy
# shopping open
who customer|shopper, tourist, young couple @ at the mall|at the shopping center, in the supermarket, at the market
do buy|purchase/sell > jacket, lamp, pair of shoes [blue, cheap|inexpensive]; return|bring back/keep > coat, toaster,
  phone [broken, new]; compare > price, brand, discount; order/send back > book, sofa|couch, birthday cake [large|big];
  choose|pick/ignore > hat, ring, carpet [small|little, colorful]; pay for > meal, dress, television|TV
kit shopping bag, gift card, basket, price tag, receipt
cmp supermarket, corner shop|corner store, department store, flea market : expensive, large, crowded, modern
def discount = a cut in the usual price; receipt = a piece of paper that proves a payment; cashier = a person who takes
  the money in a shop; warranty = a promise to repair a faulty product
why the <shoes/jackets/phones> +be on sale => the <customers/tourists> +buy more; the <shop/market> *close early => the
  family *go home without food; the <coat/dress> *be too small => the woman *buy another one
# news
who journalist|reporter, editor, news photographer @ in Berlin, at the press conference, in the newsroom
do interview > mayor*, athlete*, survivor* [famous|well-known]; publish/withdraw > article, photo, report [long,
  shocking]; check|verify > fact, rumor, source; write > headline, story, editorial [short, critical]; film|record >
  protest, speech, parade [large|big]; expose|uncover/hide > scandal, lie, fraud
kit camera, newspaper, press pass, microphone, voice recorder
cmp newspaper, magazine, radio station, news website : reliable, popular, old, critical
def headline = the title of a newspaper article; rumor = a story that may not be true; tabloid = a newspaper full of
  gossip
why the <minister/mayor> *resign => the newspapers +print a special edition; the <report/article> *be false => the
  editor *apologize to the readers; the <satellite link/microphone> *fail => the interview *be stopped
# construction open
who builder|construction worker, carpenter, roofer, plumber @ at the construction site|on the building site, in the old
  town
do build/demolish|tear down > house, wall, garage [small|little]; repair|fix/damage > roof, pipe, staircase [old,
  broken]; install/remove > door, window, sink [new]; paint > fence, ceiling, front door [white, old]; measure > room,
  beam, floor; load/unload > truck, van, trailer [heavy]; saw > plank, board, log [long, thick]
kit hammer, ladder, toolbox, drill, bag of cement, hard hat
cmp brick house, wooden cabin, office tower, stone bridge : tall, expensive, stable, modern, old
def crane = a machine for lifting heavy loads; architect = a person who designs buildings; brick = a block of baked clay
why the <cement/paint> *be wet => the workers +wait until noon; the <ladder/crane> *be damaged => the work *stop; the
  <roof/pipe> *leak => the <kitchen/cellar> *fill with water
# ocean
it shark, dolphin, whale, octopus @ near the island, in the Pacific, off the coast of Australia
do follow > boat, ship, swimmer*, fishing net [small|little]; attack/avoid > seal, diver*, turtle [young]; swim > under
  the boat, around the reef, toward the beach; dive > into deep water, under the ice, down to the wreck
who diver, marine biologist, sailor, fisherman @ near the reef, in the harbor, on the open sea|out at sea
do photograph > coral reef, jellyfish, sea turtle [rare, colorful]; rescue|save > swimmer*, dolphin, child*
  [injured|hurt]; repair|fix/sink > boat, yacht, raft [old, wooden]; explore > cave, shipwreck, lagoon [deep];
  lower/raise|hoist > anchor, sail, net [heavy]; study > whale, plankton~, ocean current
kit life jacket, fishing net, diving mask, rope, lantern
cmp whale, shark, dolphin, sea turtle : large, fast, intelligent, dangerous
def tide = the rise and fall of the sea; reef = a line of rock or coral in the sea; harbor = a safe place for ships
why the <sea/water> *be too rough => the <fishermen/divers> +stay in the harbor; the <ship/tanker> *hit a rock => the
  oil *pollute the beach; the water *get warmer => the <corals/fish> +die
# space
it space probe|spacecraft, rover, satellite @ near Mars, on the far side of the moon, in orbit
do photograph > crater, moon, comet [large|big, icy]; collect/lose > rock sample, dust sample [small|little];
  send|transmit > signal, image, message [weak, clear]; detect > magnetic field, gas cloud, radio wave [strong]
who astronaut, astronomer, space engineer @ at the space center, at the observatory, at the control center
do study > planet, galaxy, black hole [distant]; discover|find > star, exoplanet, comet [new]; repair|fix/break >
  antenna, solar panel, telescope [large|big]; test/ignore > space suit, engine, landing system; launch/destroy >
  rocket, satellite
kit telescope, space suit, moon rock, star map, oxygen tank
cmp earth, moon, planet Mars, sun : large, hot, bright, heavy
def orbit = the path of an object around a planet; galaxy = a huge group of stars; crater = a hole made by a falling
  rock
why the <engine/computer> *fail => the <rocket/probe> *miss the planet; the <sky/night> *be cloudy => the astronomers
  +see nothing; the <battery/solar panel> *freeze => the rover *lose power
# traffic open
who driver|motorist, cyclist|bike rider, truck driver @ on the highway|on the motorway, near the school, downtown
do pass|overtake > bus, truck, tractor [slow]; cross > bridge, street, railway line [busy]; notice/ignore > red light,
  stop sign, speed limit; clean|wash > car, van, windshield [dirty]; park > car, motorcycle|motorbike [white];
  avoid/hit|strike > tree, wall, deer; repair|fix > tire, brake, headlight [broken]
kit helmet, traffic cone, road map, bicycle lock, spare tire
cmp bus, train, car, bicycle|bike : fast, expensive, comfortable, safe, noisy
def detour = a longer way around a closed road; pedestrian = a person on foot; traffic jam = a long line of waiting cars
why the <bridge/tunnel> *be closed => the traffic *come to a stop; the road *be icy => the <bus/truck> *slide into the
  ditch; the <driver/cyclist> *ignore the red light => the police +stop the traffic
# art open
who painter|artist, sculptor, art student @ in the studio|in the workshop, at the gallery, in Florence
do paint > portrait, landscape, mural [colorful]; carve > statue, mask, bowl [wooden, small|little]; sell/buy|purchase >
  painting, sculpture, drawing [expensive|costly]; draw|sketch > face, horse, old church, tree; exhibit|display/hide >
  photograph, vase, portrait [beautiful|lovely]; finish|complete/destroy > painting, sculpture, sketch [large|big]
kit paintbrush, canvas, picture frame, sketchbook, tube of paint
cmp painting, statue, photograph, drawing : beautiful, valuable, old, large, famous
def portrait = a picture of a person; palette = a board for mixing colors; gallery = a building where art is shown
why the <painting/vase> *be a fake => the museum *ask for the money back; the <light/sun> *be too strong => the colors
  +fade; the <artist/sculptor> *become famous => the prices +rise
"""

IRREGULAR = {first: (rest[0], rest[-1]) for first, *rest in map(str.split, (
    "become became become; begin began begun; break broke broken; bring brought; build built; buy bought; catch "
    "caught; choose chose chosen; come came come; cut cut; dig dug; draw drew drawn; eat ate eaten; fall fell "
    "fallen; feed fed; find found; forecast forecast; forget forgot forgotten; freeze froze frozen; get got; go "
    "went gone; have had; hear heard; hide hid hidden; hit hit; keep kept; leave left; lose lost; make made; "
    "overtake overtook overtaken; pay paid; read read; redo redid redone; ride rode ridden; rise rose risen; run "
    "ran run; see saw seen; sell sold; send sent; set set; shut shut; sing sang sung; sink sank sunk; sleep slept; "
    "slide slid; stand stood; strike struck; sweep swept; swim swam swum; take took taken; tear tore torn; throw "
    "threw thrown; uphold upheld; wake woke woken; win won; withdraw withdrew withdrawn; write wrote written"
).split("; "))}
PLURALS = {"child": "children", "deer": "deer", "fisherman": "fishermen", "hypothesis": "hypotheses",
           "jellyfish": "jellyfish", "knife": "knives", "loaf": "loaves", "man": "men", "mouse": "mice",
           "potato": "potatoes", "quiz": "quizzes", "spacecraft": "spacecraft", "thief": "thieves",
           "tomato": "tomatoes", "wolf": "wolves", "woman": "women"}
ANTONYMS = dict(pair.split() for pair in (
    "hot cold; cold warm; warm cold; spicy mild; thick thin; strong weak; fast slow; wet dry; windy calm; "
    "expensive cheap; safe dangerous; risky safe; tall short; long short; large small; heavy light; loud quiet; "
    "quiet noisy; old new; clean dirty; difficult easy; interesting boring; complicated simple").split("; "))
NUMBERS = {2: "two|a couple of", 3: "three", 4: "four", 5: "five", 6: "six|half a dozen", 7: "seven", 8: "eight",
           9: "nine", 10: "ten", 12: "twelve|a dozen", 15: "fifteen", 20: "twenty"}
COUNTABLE = [f"{words}|{n}" for n, words in NUMBERS.items()]
QUANTITIES = [*COUNTABLE, "many|a lot of|lots of", "several|a number of"]
PEOPLE = ["man", "woman", "boy", "girl", "teenager", "old man|elderly man", "old woman|elderly woman"]
NAMES = {"Anna": "she", "Tom": "he", "Maria": "she", "David": "he", "Sofia": "she", "Ahmed": "he", "Laura": "she",
         "Peter": "he", "Mei": "she", "Carlos": "he", "Olga": "she", "Kofi": "he"}
TRAITS = ["young", "tired|exhausted", "friendly|kind", "tall", "local"]
SPEAKERS = ["neighbor", "manager|boss", "visitor", "colleague|coworker", "old friend", "young woman", "firefighter"]
MANNERS = ["again|once more", "for the first time", "without any help|without help from anyone",
           "in a hurry|in great haste", "with a friend|together with a friend", "very carefully|with great care"]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
TIMES = {
    "past": ["yesterday", "last week", "last night", "last summer", "this morning|earlier this morning", "in March",
             "two weeks ago|a fortnight ago", "a week ago|seven days ago", "a few days ago|some days ago", "in October",
             "over the weekend|at the weekend", *(f"on {day}" for day in DAYS)],
    "progressive": ["right now|at the moment", "today", "this week"],
    "future": ["tomorrow", "next week", "next month", "this evening|tonight", "in two days|two days from now",
               "in an hour|an hour from now", "soon|before long", *(f"next {day}" for day in DAYS)],
    "present": ["every day|each day", "every morning|each morning", "every week|once a week",
                "twice a month|two times a month", "every summer|each summer", "now and then|from time to time",
                *(f"every {day}|on {day}s" for day in DAYS)],
    "perfect": ["this week", "this year", "recently|lately", "today"]}
REMARKS = {
    "D": ["", "before lunch", "by Friday|no later than Friday", "as soon as possible|right away", "tomorrow morning",
          "before the end of the day|before the day is over", "before you leave|before leaving"],
    "N": ["", "without permission|unless you have permission", "after dark|when it is dark", "on your own|alone",
          "when you are tired|while you are tired"],
    "Z": ["Nobody had expected this.|This came as a surprise to everyone.",
          "No one knows why.|The reason is still unknown.",
          "It was not the first time.|The same thing had happened before.",
          "A friend told us about it.|We heard about it from a friend.",
          "In the end, everyone was happy.|Everybody was satisfied at the end.",
          "Everybody talked about it.|It was the talk of the town.",
          "A crowd of people came to watch.|Many people gathered to see it.",
          "It was a cold, gray day.|The day was cold and gray.",
          "Some people were against it.|Not everyone agreed with it.",
          "Nothing like this had happened for years.|It had been years since anything like this happened.",
          "Later, it started to rain.|Some time afterward, it began to rain."]}

# A line "# name share tenses options" starts a construction; each line below it is one meaning with its wordings,
# "kind: " in front where the kind has a name; "wrap" is put around all. hides: event roles that are left out; extras:
# other slots; view: see viewed(). Slots: S subject, B another person, O object, C another object, X a thing, P place,
# T time, FT and FP the same fronted, M manner, D, N and Z remarks; V, G, F, NF, L, Q the verb phrase as infinitive,
# gerund, finite, negated, reported, question; F2, G2 of a second event; PF, PN, PQ the passive clause, negated,
# question. event_slots() has the rest.
GRAMMAR = """
# statement 14 past,past,progressive,future
S F M P T.|PF M P T.|PF P M T.|FT S F M P.|FT PF P M.|FP S F M T.|IT S REL F M P T.
# habit 4 present
S F M P T.|PF M P T.|PF P M T.|FT S F M P.|FT PF P M.|FP S F M T.|IT S REL F M P T.
# perfect 3 perfect
S F M P T.|PF M P T.|PF P M T.|FP S F M T.|IT S REL F M P T.
# negation 4 past,progressive,future hides=manner view=definite
S NF P T.|PN P T.|FT S NF P.|it is not true that S F P T.
# passage 8 past extras=Z
S F M P T. Z|PF M P T. Z|FT S F M P. Z|FT PF P M. Z|FP S F M T. Z|IT S REL F M P T. Z
# yes-no-question 6 past,progressive,future
Q M P T?|PQ M P T?|is it true that S F M P T?|do you know whether S F M P T?|can you tell me if S F M P T?
# wh-question 10 past,future hides=manner
who: WHO F1 P T?|WHO ISIT that F1 P T?|do you know WHO F1 P T?|can you tell me WHO F1 P T?
obj: WHAT Q P T?|WHAT ISIT that S F P T?|do you know WHAT S F P T?|can you tell me WHAT S F P T?
place: where Q T?|where PQ T?|do you know where S F T?|can you tell me where S F T?
time: when Q P?|when PQ P?|do you know when S F P?|can you tell me when S F P?
why: why Q P T?|why PQ P T?|for what reason Q P T?|what is the reason why S F P T?
# how-to 8 present hides=who,place,time,manner view=kind people transitive
how do you V?|how can I V?|what is the best way to V?|how should I V?|what is a good way to V?
how long does it take to V?|how much time does it take to V?|how much time do you need to V?
how much does it cost to V?|what does it cost to V?|how expensive is it to V?
is it hard to V?|is it difficult to V?|is G difficult?
where can I learn to V?|where can I learn how to V?|what is a good place to learn how to V?
which tools do I need to V?|what equipment is needed to V?|what tools are needed for G?
why is it important to V?|what makes G important?|why does G matter?
when is the best time to V?|what is the right time to V?|when should I V?
which mistakes should I avoid when G?|what mistakes are common when G?
# job-question 3 present hides=place,time,manner view=job people transitive
how does S V?|in what way does S V?|how is it that S can V?
how long does it take S to V?|how much time does S need to V?
why does S V?|for what reason does S V?|what makes S V?
how often does S V?|how frequently does S V?
can S V without help?|is S able to V without help?
# caption 8 progressive hides=time,manner view=generic
S BE G P.|S G P.|there BE S G P.|S can be seen G P.|PF P.
# reported-speech 6 past,future hides=manner extras=B
B said that S L P T.|B stated that S L P T.|according to B, S F P T.
B denied that S L P T.|B said it was not true that S L P T.
B believed that S L P T.|B BWAS convinced that S L P T.|B BWAS sure that S L P T.
B doubted that S L P T.|B BWAS not sure whether S L P T.
B asked whether S L P T.|B wanted to know if S L P T.
B heard that S L P T.|B BWAS told that S L P T.
B read in a letter that S L P T.|B learned from a letter that S L P T.
# intention 7 past hides=manner people
wrap S {} P T.|FT S {} P.
managed to V|succeeded in G
failed to V|did not manage to V|WAS unable to V
forgot to V|did not remember to V
remembered to V|did not forget to V
refused to V|WAS not willing to V|WAS unwilling to V
decided to V|made the decision to V|chose to V
began to V|started to V
tried to V|attempted to V|made an attempt to V
WAS allowed to V|had permission to V
WAS forbidden to V|WAS not allowed to V|had no permission to V
had to V|WAS forced to V|WAS obliged to V
planned to V|intended to V|had plans to V
enjoyed G|took pleasure in G|liked G
hated G|strongly disliked G
promised to V|gave a promise to V
WAS afraid to V|did not dare to V
regretted G|WAS sorry about G
# request 6 past hides=manner extras=B people
wrap {} P T.|FT {} P.
B asked S to V|S WAS asked by B to V|B requested that S V
B told S to V|B ordered S to V|S WAS told by B to V
B persuaded S to V|B convinced S to V|S WAS persuaded by B to V
B helped S to V|B helped S V|S got help from B in G
B allowed S to V|B gave S permission to V|B let S V|S got permission from B to V
B forbade S to V|B did not allow S to V|S WAS not allowed by B to V
B thanked S for G|S WAS thanked by B for G
B praised S for G|B complimented S on G|S WAS praised by B for G
B criticized S for G|S WAS criticized by B for G|S received criticism from B for G
B taught S to V|B showed S how to V|S learned from B how to V
B warned S not to V|S WAS warned by B not to V|B warned S against G
# transfer 5 past hides=verb,obj,manner extras=B,X people
wrap {} P T.|FT {} P.
S gave X to B|S gave B X|B got X from S|B BWAS given X by S
S sold X to B|S sold B X|B bought X from S
S lent X to B|S lent B X|B borrowed X from S
S showed X to B|S showed B X|B BWAS shown X by S
S returned X to B|S gave X back to B|B got X back from S
S stole X from B|B BWAS robbed of X by S
S promised X to B|S promised B X|B BWAS promised X by S
# instruction 5 present hides=who,time,manner extras=D,N people transitive
do: please V P D.|make sure to V P D.|remember to V P D.|do not forget to V P D.|you should V P D.|O should be PP P D.
not: do not V P N.|you must not V P N.|please avoid G P N.|you should never V P N.
# sequence 5 past hides=manner extras=E
after G, S F2 P T.|S F and then F2 P T.|S first F and later F2 P T.|before G2, S F P T.|S F P T. After that, PRO F2.
# contrast 4 past,future hides=manner extras=C transitive
not: S F but not C P T.|PF P T, but C CAUX not.
instead: S F instead of C P T.|instead of C, S F P T.|S F rather than C P T.
both: S F as well as C P T.|S FV both O and C P T.|S FV not only O but also C P T.
# count 3 present hides=who,verb,obj,time,manner extras=X people
there are X P.|X are P.|FP there are X.|X can be found P.|you will find X P.
# how-many 1 present hides=who,verb,obj,time,manner extras=X people
how many XS are there P?|what is the number of XS P?|do you know how many XS are P?
# noun-phrase 4 present hides=who,time,manner view=kind people transitive
wrap {} P
tips for G|advice on how to V|useful hints for G
a guide to G|instructions for G|step-by-step instructions on how to V
a photo of S G|a picture showing S G|an image of S G
the cost of G|the price of G|how much it costs to V
a book about G|a book on how to V
a plan to V|a plan for G
a discussion about G|a conversation about G|a talk about G
the dangers of G|the risks of G
problems with G|difficulties when G
a job that involves G|a job in which you have to V
# headline 4 present hides=time,manner view=bare transitive
S F P|O PP by S P
# if 3
if CNOW, EWILL.|EWILL if CNOW.|if CNOW, then EWILL.|should CBASE, EWILL.
# whenever 2
whenever CNOW, ENOW.|ENOW whenever CNOW.|each time CNOW, ENOW.|ENOW every time CNOW.
# because 4
TT EPAST because CPAST.|TT CPAST, so EPAST.|since CPAST, EPAST T.|the reason why EPAST T was that CPAST.
# although 3
although CPAST, ENOT T.|TT CPAST, but ENOT.|ENOT T even though CPAST.|CPAST T. Nevertheless, ENOT.
# why 2
why EASK T?|for what reason EASK T?|do you know why EPAST T?|what was the reason why EPAST T?
# comparison 5
A BE MORE than B.|compared with B, A BE MORE.|B BE LESS than A.|B BE not NEAR as ADJ as A.
# which 2
which is ER, A or B?|is A or B ER?|which one is ER: A or B?|between A and B, which one is ER?
# definition 1
N BE DEF.|N can be defined as DEF.|the word W means DEF.|DEF BE called N.|we call DEF N.
# what-is 1
what BE N?|what does the word W mean?|how would you define W?|can you explain what N BE?|do you know what N BE?
# which-word 1
what do you call DEF?|what is the word for DEF?|which word describes DEF?
"""
ANSWERS = {"wh-question": "statement", "why": "because", "which": "comparison", "what-is": "definition",
           "which-word": "definition", "how-many": "count"}
NEGATED = {"statement": "negation", "negation": "statement", "because": "although", "although": "because"}
COUNTS = ("count", "how-many")
DEGREES = ("", "much|far", "slightly|a little")
SLOT = re.compile(r"\b[A-Z][A-Z0-9]*\b")
CONTRACTED = re.compile(r"\b([Dd]id|[Dd]o|[Dd]oes|is|was|were|has|had|are|would) not\b")
PREPOSITIONS = ("across ", "along ", "around ", "down ", "in ", "into ", "on ", "over ", "through ", "toward ",
                "under ", "up ")


class Noun(NamedTuple):
    """Words for one thing ("a|b"); kind is "" count, "~" mass, "^" plural, "!" unique, "*" person, "name" or "pp"."""
    words: str
    kind: str = ""


class Frame(NamedTuple):
    verb: str
    opposite: str
    objects: tuple[Noun, ...]
    adjectives: tuple[str, ...]


class Block(NamedTuple):
    """Agents, places, times and frames that all fit each other."""
    human: bool
    agents: tuple[Noun, ...]
    places: tuple[str, ...]
    times: tuple[str, ...]
    frames: tuple[Frame, ...]


class Topic(NamedTuple):
    name: str
    open: bool
    blocks: list[Block]
    kit: tuple[Noun, ...] = ()
    cmp: tuple[tuple[str, ...], ...] = ()
    terms: tuple[tuple[str, ...], ...] = ()
    why: tuple[tuple[str, ...], ...] = ()


class Family(NamedTuple):
    """A construction of GRAMMAR; kinds maps each kind to its templates and their slots."""
    share: int
    tenses: list[str]
    kinds: dict[str, dict[str, set[str]]]
    hides: list[str]
    extras: list[str]
    view: str
    people: bool
    transitive: bool


class NP(NamedTuple):
    """A noun phrase; det is "the", "a", "" (bare), "the+" and "+" (plural), or a quantity "two|2"."""
    noun: Noun
    det: str
    adj: str = ""

    @property
    def plural(self) -> bool:
        return self.noun.kind == "^" or self.det not in ("the", "a", "")


class Event(NamedTuple):
    block: Block
    frame: Frame
    who: NP
    verb: str
    obj: NP
    place: str
    time: str
    manner: str
    tense: str


class Scene(NamedTuple):
    """What a sentence says: a construction and its kind, an event with extras x or, without an event, x alone."""
    topic: Topic
    family: str
    kind: str
    event: Event | None
    x: dict[str, Any]


def listed(text: str, sep: str = ",") -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(sep) if part.strip())


def nouns(text: str) -> tuple[Noun, ...]:
    marked = (re.fullmatch(r"(.*?)([~^!*]?)", word) for word in listed(text))
    return tuple(Noun(m[1], "pp" if m[1].startswith(PREPOSITIONS) else m[2]) for m in marked)


@functools.cache
def lexicon() -> tuple[Topic, ...]:
    """LEXICON parsed."""
    topics: list[Topic] = []
    for line in re.sub(r"\n +", " ", LEXICON).strip().splitlines():
        key, _, rest = line.partition(" ")
        if key == "#":
            topics.append(Topic(rest.split()[0], rest.endswith(" open"), []))
        elif key in ("who", "it"):
            human, (agents, places, times) = key == "who", (rest + "@" * (2 - rest.count("@"))).split("@")
        elif key == "do":
            frames = []
            for frame in listed(rest, ";"):
                verbs, objects, adjectives = re.fullmatch(r"(.*?) > ([^[]*)(?:\[(.*)\])?", frame).groups("")
                frames.append(Frame(*(*listed(verbs, "/"), "")[:2], nouns(objects), listed(adjectives)))
            topics[-1].blocks.append(Block(human, nouns(agents), listed(places), listed(times), tuple(frames)))
        elif key == "kit":
            topics[-1] = topics[-1]._replace(kit=nouns(rest))
        else:
            outer, inner = {"cmp": ":,", "def": ";=", "why": (";", "=>")}[key]
            topics[-1] = topics[-1]._replace(**{key.replace("def", "terms"): tuple(
                listed(part, inner) for part in listed(rest, outer))})
    return tuple(topics)


@functools.cache
def families() -> dict[str, Family]:
    """GRAMMAR parsed."""
    out = {}
    for part in listed(GRAMMAR, "# "):
        head, *lines = part.split("\n")
        name, share, *options = head.split()
        tenses = options.pop(0).split(",") if len(options) else []
        given = {k: v for k, _, v in (o.partition("=") for o in options)}
        wrap = lines.pop(0)[5:] if lines[0].startswith("wrap ") else "{}"
        kinds = {}
        for i, line in enumerate(lines):
            kind, text = re.fullmatch(r"(?:(\w+): )?(.*)", line).groups()
            templates = [w.replace("{}", t) for w in wrap.split("|") for t in text.split("|")]
            kinds[kind or str(i)] = {t: set(SLOT.findall(t)) for t in templates}
        out[name] = Family(int(share), tenses, kinds, *(given.get(k, "").split(",") for k in ("hides", "extras")),
                           given.get("view", ""), "people" in given, "transitive" in given)
    return out


def pick(rng: random.Random, seq: Sequence[Any]) -> Any:
    # Only random() is documented to give the same sequence in every Python version.
    return seq[int(rng.random() * len(seq))]


def syn(rng: random.Random, group: str) -> str:
    return pick(rng, group.split("|")) if "|" in group else group


def other(rng: random.Random, seq: Iterable[Any], *used: Any) -> Any:
    """A member of seq that is not in used, or None."""
    left = [item for item in seq if item not in used]
    return pick(rng, left) if left else None


def doubled(word: str) -> str:
    """The word with its last consonant doubled if its ending asks for that: "chop" -> "chopp"."""
    return word + word[-1] if re.fullmatch(r"(trans|be|for)?[^aeiou]*[aeiou][^aeiouwxy]", word) else word


@functools.cache
def plural(text: str) -> str:
    """Plural of a noun phrase; the head is the word before " of ", else the last one."""
    head, of, rest = text.partition(" of ")
    stem, space, last = head.rpartition(" ")
    regular = last + "es" if re.search(r"(s|x|z|ch|sh)$", last) else re.sub(r"(?<=[^aeiou])y$", "ie", last) + "s"
    return stem + space + PLURALS.get(last, regular) + of + rest


@functools.cache
def inflect(verb: str, form: str) -> str:
    """form: base, s, past, pp or ing; only the first word changes."""
    word, space, rest = verb.partition(" ")
    if form == "s":
        word = {"have": "has", "go": "goes", "redo": "redoes"}.get(word) or plural(word)
    elif form == "ing":
        word = {"die": "dy"}.get(word, re.sub(r"(?<=[^e])e$", "", doubled(word))) + "ing"
    elif form != "base" and word in IRREGULAR:
        word = IRREGULAR[word][form == "pp"]
    elif form != "base":
        word = word + "d" if word.endswith("e") else re.sub(r"(?<=[^aeiou])y$", "i", doubled(word)) + "ed"
    return word + space + rest


@functools.cache
def split_verb(verb: str, tense: str, many: bool, passive: bool = False) -> tuple[str, str]:
    """Auxiliary and remainder of a finite verb: ("did", "chop"), ("is", "being chopped")."""
    was, be, has, do = ("were", "are", "have", "do") if many else ("was", "is", "has", "does")
    if passive or verb.startswith("be "):
        pp = verb[3:] if verb.startswith("be ") else inflect(verb, "pp")
        return {"past": (was, pp), "present": (be, pp), "progressive": (be, "being " + pp), "base": ("be", pp),
                "future": ("will", "be " + pp), "perfect": (has, "been " + pp)}[tense]
    ing, pp = inflect(verb, "ing"), inflect(verb, "pp")
    return {"past": ("did", verb), "present": (do, verb), "progressive": (be, ing), "base": ("", verb),
            "future": ("will", verb), "would": ("would", verb), "perfect": (has, pp), "pluperfect": ("had", pp)}[tense]


def finite(verb: str, tense: str, many: bool, neg: bool = False) -> str:
    aux, rest = split_verb(verb, tense, many)
    if not neg and aux in ("did", "do", "does"):
        return inflect(verb, {"did": "past", "do": "base", "does": "s"}[aux])
    return f"{aux}{' not' * neg} {rest}".strip()


def article(text: str) -> str:
    vowel = re.match(r"[aeiouAEIO]|X-ray", text) and not re.match(r"uni[^nmd]|use|one\b", text)
    return ("an " if vowel else "a ") + text


def comparative(adj: str) -> str:
    word, space, rest = adj.partition(" ")
    if re.fullmatch(r"[^aeiouy]*[aeiouy]+[^aeiouy]*e?|.*y|simple", word) and word != "stable":
        return re.sub(r"e$", "", re.sub(r"y$", "i", doubled(word))) + "er" + space + rest
    return "more " + adj


def render(rng: random.Random, np: NP) -> str:
    words = syn(rng, np.noun.words)
    if np.noun.kind in ("name", "pp"):
        return words
    words = f"{syn(rng, np.adj)} {plural(words) if np.plural and np.noun.kind != '^' else words}".strip()
    return article(words) if np.det == "a" else f"{syn(rng, np.det).rstrip('+')} {words}".strip()


def viewed(np: NP, view: str) -> NP:
    """The phrase as a view wants it: definite "the cake", generic "a cake", bare "cake"; kind and job count nothing."""
    kind, det = np.noun.kind, np.det
    if not view or kind == "pp" or kind == "name" and view not in ("generic", "kind"):
        return np
    if kind == "name":
        return NP(Noun("woman" if NAMES[np.noun.words] == "she" else "man"), "a")
    if view == "definite":
        return np._replace(det="the+" if np.plural else "the")
    if kind in ("~", "^") or kind == "!" and view == "bare":
        return np._replace(det="")
    if det in QUANTITIES and view in ("kind", "job"):
        return np._replace(det="+")
    one = "" if view == "bare" else "a"
    return np if kind == "!" else np._replace(det={"the": one, "the+": "+", "a": one}.get(det, det))


def event_slots(rng: random.Random, sc: Scene) -> dict[str, str | None]:
    """Fillers of the template slots of an event scene; None where a template with that slot does not apply."""
    e, x, view, human = sc.event, sc.x, families()[sc.family].view, sc.event.block.human
    who, obj = (viewed(np, view) for np in (e.who, e.obj))
    if view == "job" and who.noun.kind != "name":
        who = who._replace(det="a")
    v, s, many = syn(rng, e.verb), render(rng, who), who.plural
    o = "" if sc.kind == "obj" else render(rng, obj)
    place, time = ("" if sc.kind == role else syn(rng, group) for role, group in (("place", e.place), ("time", e.time)))
    place = place.replace("the ", "") if view == "bare" else place
    aux, rest = split_verb(v, e.tense, many)
    verb, ing = finite(v, e.tense, many), inflect(v, "ing")
    told = finite(v, {"past": "pluperfect", "future": "would"}.get(e.tense, e.tense), many)
    it = ["it", "was" if e.tense == "past" else "is"]
    d: dict[str, str | None] = {
        "S": s, "O": o, "P": place, "T": time, "M": syn(rng, e.manner), "V": f"{v} {o}", "G": f"{ing} {o}",
        "F": f"{verb} {o}", "FV": verb, "F1": f"{finite(v, e.tense, False)} {o}", "L": f"{told} {o}",
        "NF": f"{finite(v, e.tense, many, True)} {o}", "Q": f"{aux} {s} {rest} {o}", "BE": "are" if many else "is",
        "WAS": "were" if many else "was", "IT": " ".join(it), "ISIT": " ".join(it[::-1]),
        "REL": "who" if human else "that", "WHO": "who" if human else "what",
        "WHAT": "who" if obj.noun.kind == "*" else "what", "FP": f"{place}," if place else None,
        "FT": f"{time}," if time else None, **dict.fromkeys(("PF", "PN", "PQ", "PP"))}
    if obj.noun.kind != "pp":
        aux, rest = split_verb(v, e.tense, obj.plural, True)
        d |= {"PF": f"{o} {aux} {rest} by {s}", "PN": f"{o} {aux} not {rest} by {s}", "PQ": f"{aux} {o} {rest} by {s}",
              "PP": inflect(v, "pp")}
    for slot, value in x.items():
        if slot == "E":
            v, o = syn(rng, value[0]), render(rng, value[1])
            again = "they" if many else render(rng, who._replace(det="the")) if human else "it"
            d |= {"F2": f"{inflect(v, 'past')} {o}", "G2": f"{inflect(v, 'ing')} {o}", "PRO": NAMES.get(s, again)}
        else:
            d[slot] = " ".join(syn(rng, group) for group in value) if slot in REMARKS else render(rng, value)
    if "B" in x:
        d["BWAS"] = "were" if x["B"].plural else "was"
    if "C" in x:
        d["CAUX"] = split_verb(v, e.tense, x["C"].plural, True)[0]
    if "X" in x:
        d["XS"] = render(rng, x["X"]._replace(det="+", adj=""))
    return d


def clause(text: str, form: str) -> str:
    """One cause or effect ("the oven *be hot") in a tense of split_verb, negated (not) or asked after (ask)."""
    subject, mark, verb = re.split(r" ([*+])", text)
    if form == "ask":
        aux, rest = split_verb(verb, "past", mark == "+")
        return f"{aux} {subject} {rest}"
    return f"{subject} {finite(verb, 'past' if form == 'not' else form, mark == '+', form == 'not')}"


def other_slots(rng: random.Random, sc: Scene) -> dict[str, str | None]:
    """Fillers for causes, comparisons and terms."""
    x = sc.x
    if "cause" in x:
        forms = {"NOW": "present", "PAST": "past", "BASE": "base", "WILL": "future", "NOT": "not", "ASK": "ask"}
        time = syn(rng, x["time"])
        slots = {"C" + slot: clause(x["cause"], form) for slot, form in forms.items()}
        slots |= {"E" + slot: clause(x["effect"], form) for slot, form in forms.items()}
        return {**slots, "T": time, "TT": time and f"{time},"}
    if "adj" in x:
        adj, degree = x["adj"], syn(rng, x["degree"])
        return {"A": f"the {syn(rng, x['a'])}", "B": f"the {syn(rng, x['b'])}", "BE": x["be"], "ADJ": adj,
                "ER": comparative(adj), "MORE": f"{degree} {comparative(adj)}",
                "NEAR": {"m": "nearly", "s": "quite"}.get(x["degree"][:1], ""),
                "LESS": f"{degree} {comparative(ANTONYMS[adj])}" if adj in ANTONYMS else None}
    term, = nouns(x["term"])
    return {"N": term.words if term.kind else article(term.words), "W": f'"{term.words}"', "DEF": x["gloss"],
            "BE": "are" if term.kind == "^" else "is"}


def wording(rng: random.Random, sc: Scene, used: set[str]) -> str:
    """A sentence for the scene, of a template that is not in used if there is one; adds its template to used."""
    slots = (event_slots if sc.event else other_slots)(rng, sc)
    missing = {slot for slot, filler in slots.items() if filler is None}
    options = [t for t, needed in families()[sc.family].kinds[sc.kind].items() if not needed & missing]
    template = pick(rng, [t for t in options if t not in used] or options)
    used.add(template)
    first, *rest = SLOT.sub(lambda m: slots.get(m[0], m[0]), template).split()
    first = NUMBERS[int(first)].split("|")[0] if first.isdigit() else first
    text = " ".join((first, *rest)).replace(" ,", ",").replace(" .", ".").replace(" ?", "?")
    if rng.random() < 0.3:
        text = CONTRACTED.sub(r"\1n't", text).replace("will not ", "won't ")
    return text[0].upper() + text[1:] if text[-1] in ".?" or sc.family == "headline" else text


@functools.cache
def bare(text: str) -> str:
    """Lower case without punctuation and spaces, for comparing sentences."""
    return re.sub(r"[\W_]+", "", text.lower())


def realise(rng: random.Random, sc: Scene, n: int = 1) -> list[str]:
    """n different sentences for the scene, of different templates where there are enough; fewer if it has fewer."""
    out: dict[str, str] = {}
    used: set[str] = set()
    for _ in range(4 * n):
        if len(out) < n:
            text = wording(rng, sc, used)
            out.setdefault(bare(text), text)
    return list(out.values())


def new_np(rng: random.Random, noun: Noun | None, adjectives: Sequence[str], often: float = 0.35,
           most: int = 99) -> NP | None:
    """A phrase for the noun, if any; often is the share with an adjective, most limits the quantities."""
    if noun is None or noun.kind in ("name", "pp"):
        return noun and NP(noun, "")
    r, adjective = rng.random(), rng.random() < often and noun.kind != "!" and bool(adjectives)
    det = "the" if r < 0.4 else "a" if r < 0.65 else "the+" if r < 0.75 else pick(rng, QUANTITIES[:most])
    return NP(noun, "the" if noun.kind in ("~", "!", "^") else det, pick(rng, adjectives) if adjective else "")


def new_agent(rng: random.Random, topic: Topic, block: Block, *used: Noun) -> NP | None:
    agents = block.agents
    if block.human and topic.open and rng.random() < 0.35:
        agents = [Noun(n, "name") for n in NAMES] if rng.random() < 0.5 else [Noun(n) for n in PEOPLE]
    noun = other(rng, agents, *used)
    return new_np(rng, noun, TRAITS if noun and block.human and " " not in noun.words else (), 0.2, 5)


def new_event(rng: random.Random, topic: Topic, family: Family) -> Event | None:
    """An event for the family, or None if the topic has no block for it."""
    tense = pick(rng, family.tenses)
    block = other(rng, [b for b in topic.blocks if (b.human or not family.people) and (not b.times or tense == "past")])
    if not block:
        return None
    frame = pick(rng, [f for f in block.frames if not (family.transitive and f.objects[0].kind == "pp")])
    # Nobody asks how to burn a cake: advice and job descriptions keep to the plain verb.
    plain = "who" in family.hides or family.view == "job" or not frame.opposite
    verb = frame.verb if plain or rng.random() < 0.65 else frame.opposite
    obj = new_np(rng, pick(rng, frame.objects), frame.adjectives)
    placed = rng.random() < 0.6 and obj.noun.kind != "pp" or "obj" in family.hides
    roles = {"place": pick(rng, block.places) if placed else "",
             "time": pick(rng, block.times or TIMES[tense]) if rng.random() < 0.6 else "",
             "manner": pick(rng, MANNERS) if block.human and rng.random() < 0.15 else ""}
    return Event(block, frame, new_agent(rng, topic, block), verb, obj, tense=tense,
                 **{role: "" if role in family.hides else value for role, value in roles.items()})


def extra(rng: random.Random, sc: Scene, slot: str, *used: Noun) -> Any:
    """A value for one extra slot of an event scene, or None if there is none."""
    topic, e = sc.topic, sc.event
    if slot == "B":
        people = [*map(Noun, SPEAKERS), *(e.block.agents if e.block.human else ())]
        return new_np(rng, other(rng, people, e.who.noun, *used), (), 0, 3)
    if slot == "X":
        np = new_np(rng, other(rng, topic.kit, *used), ("new", "cheap", "large|big", "small|little"), 0.25)
        return np._replace(det=pick(rng, QUANTITIES)) if sc.family in COUNTS else np
    if slot == "C":
        noun = other(rng, e.frame.objects, e.obj.noun, *used)
        return noun and NP(noun, "the+" if e.obj.plural and noun.kind in ("", "*") else "the")
    if slot == "E":
        frame = other(rng, e.block.frames, e.frame)
        return frame and (frame.verb, new_np(rng, pick(rng, frame.objects), frame.adjectives))
    first = pick(rng, REMARKS[slot])
    return (first, other(rng, REMARKS[slot], first)) if slot == "Z" and rng.random() < 0.4 else (first,)


def fits(kind: str, e: Event) -> bool:
    """Whether the event has the role that a wh-question of this kind asks for."""
    return bool({"obj": e.obj.noun.kind != "pp", "place": e.place, "time": e.time}.get(kind, True))


def new_scene(rng: random.Random, topic: Topic, name: str) -> Scene | None:
    """A random scene of one topic and family, or None where they do not go together."""
    family = families()[name]
    if family.tenses:
        e = new_event(rng, topic, family)
        if e is None:
            return None
        sc = Scene(topic, name, pick(rng, [k for k in family.kinds if fits(k, e)]), e, {})
        sc = sc._replace(x={slot: extra(rng, sc, slot) for slot in family.extras if slot})
        return None if None in sc.x.values() else sc
    if name in ("comparison", "which"):
        things, qualities = topic.cmp
        a = pick(rng, things)
        x = {"a": a, "b": other(rng, things, a), "adj": pick(rng, qualities), "be": pick(rng, ("is", "was")),
             "degree": pick(rng, DEGREES)}
    elif name in ("definition", "what-is", "which-word"):
        x = dict(zip(("term", "gloss"), pick(rng, topic.terms)))
    else:
        pair = pick(rng, topic.why)
        cause, effect = (re.sub(r"<([^>]*)>", lambda m: pick(rng, m[1].split("/")), text) for text in pair)
        x = {"pair": pair, "cause": cause, "effect": effect,
             "time": pick(rng, TIMES["past"]) if name in ("because", "although", "why") and rng.random() < 0.6 else ""}
    return Scene(topic, name, "0", None, x)


def edited_event(rng: random.Random, sc: Scene, grade: int) -> list[Scene]:
    """Edits of an event scene; see edit()."""
    family, e, x = families()[sc.family], sc.event, sc.x
    hidden = {*family.hides, sc.kind}
    out: list[Scene] = []

    def change(role: str, *values: Any) -> None:
        if role not in hidden:
            out.extend(sc._replace(event=e._replace(**{role: value})) for value in values if value is not None)

    def swap(event: Event = e, **values: Any) -> None:
        out.append(sc._replace(event=event, x={**x, **values}))

    if grade == 4:
        for role, values in (("time", e.block.times or TIMES[e.tense]), ("manner", MANNERS)):
            if getattr(e, role):
                change(role, "", other(rng, values, getattr(e, role)))
        if e.place and sc.family not in COUNTS:
            change("place", "")
        for role in ("who", "obj"):
            if getattr(e, role).adj:
                change(role, getattr(e, role)._replace(adj=""))
        slot = {"do": "D", "not": "N"}.get(sc.kind, "Z")
        if slot in x:
            swap(**{slot: other(rng, [(remark,) for remark in REMARKS[slot]], x[slot])})
    elif grade == 3:
        change("who", new_agent(rng, sc.topic, e.block, e.who.noun, *(x[s].noun for s in x if s == "B")))
        noun = other(rng, e.frame.objects, e.obj.noun, *(x[s].noun for s in x if s == "C"))
        if noun:
            change("obj", e.obj._replace(noun=noun) if noun.kind == e.obj.noun.kind else new_np(rng, noun, ()))
        if e.obj.det in COUNTABLE and family.view in ("", "generic", "bare"):
            change("obj", e.obj._replace(det=other(rng, COUNTABLE, e.obj.det)))
        if e.frame.opposite:
            change("verb", other(rng, (e.frame.verb, e.frame.opposite), e.verb))
        if e.place:
            change("place", other(rng, e.block.places, e.place))
        if "X" in x:
            swap(X=x["X"]._replace(noun=other(rng, sc.topic.kit, x["X"].noun)))
            if x["X"].det in COUNTABLE and sc.family != "how-many":
                swap(X=x["X"]._replace(det=other(rng, COUNTABLE, x["X"].det)))
        if "B" in x:
            swap(e._replace(who=x["B"]), B=e.who)
            swap(B=extra(rng, sc, "B", x["B"].noun))
        if "E" in x:
            swap(e._replace(verb=x["E"][0], obj=x["E"][1]), E=(e.verb, e.obj))
            swap(E=extra(rng, sc, "E"))
        if "C" in x and sc.kind != "both":
            swap(e._replace(obj=x["C"]), C=e.obj)
        kind = other(rng, [k for k in family.kinds if fits(k, e)], sc.kind)
        out.extend([sc._replace(kind=kind)] * 2 if kind else [])
        if sc.family in NEGATED:
            out.append(sc._replace(family=NEGATED[sc.family]))
    else:
        new = new_event(rng, sc.topic, family)
        if new and new.block == e.block and new.frame.verb != e.frame.verb:
            new = new._replace(who=e.who, place=new.place and e.place, time=e.time, tense=e.tense)
            changed = sc._replace(event=new)
            changed = changed._replace(x={s: extra(rng, changed, s) if s in "CEX" else v for s, v in x.items()})
            if fits(sc.kind, new) and ("X" not in x or changed.x["X"] and changed.x["X"].noun != x["X"].noun):
                out.append(changed)
    return [o for o in out if None not in o.x.values()]


def edited_other(rng: random.Random, sc: Scene, grade: int) -> list[Scene]:
    """Edits of a cause, comparison or term; see edit()."""
    x, fresh = sc.x, new_scene(rng, sc.topic, sc.family)
    changes: list[dict[str, Any]] = []
    if "adj" in x:
        things, qualities = sc.topic.cmp
        thing, adj = other(rng, things, x["a"], x["b"]), other(rng, qualities, x["adj"], ANTONYMS.get(x["adj"]))
        small = [{"degree": other(rng, DEGREES, x["degree"])}, {"be": "was" if x["be"] == "is" else "is"}]
        turned = [{"a": x["b"], "b": x["a"]}]
        if sc.family == "which":
            small, turned = [], []
        changes = {4: small, 3: [{"adj": adj}, {"b": thing}, *turned], 2: [{"adj": adj, "b": thing}]}[grade]
    elif "pair" in x and grade == 4:
        changes = [{"time": ""}, {"time": other(rng, TIMES["past"], x["time"])}] if x["time"] else []
    elif "pair" in x and grade == 3 and sc.family in NEGATED and rng.random() < 0.5:
        return [sc._replace(family=NEGATED[sc.family])]
    elif grade == (3 if "pair" in x and fresh.x["pair"] == x["pair"] else 2):
        changes = [{**fresh.x, "time": x["time"]} if "pair" in x else fresh.x]
    return [sc._replace(x={**x, **change}) for change in changes if {**x, **change} != x]


def edit(rng: random.Random, sc: Scene, grade: int) -> Scene | None:
    """The scene with a detail (4), an important detail (3) or most but not all roles (2) changed, or None."""
    options = (edited_event if sc.event else edited_other)(rng, sc, grade)
    return pick(rng, options) if options else None


def split_of(seed: int, sc: Scene) -> str:
    """train, dev or test, by what the scene is about, so that one scene never reaches two of them."""
    e, x, hides = sc.event, sc.x, families()[sc.family].hides
    if e and "obj" in hides:
        about = f"{x['X'].noun.words} {e.place}"
    elif e:
        about = f"{e.frame.verb} {e.obj.noun.words} {e.who.noun.words * ('who' not in hides)}"
    elif "adj" in x:
        about = f"{sorted((x['a'], x['b']))} {x['adj']}"
    else:
        about = x["cause"] + x["effect"] if "cause" in x else x["term"]
    return {0: "dev", 1: "test"}.get(zlib.crc32(f"{seed} {sc.topic.name} {about}".encode()) % 7, "train")


def dropped(rng: random.Random, sc: Scene) -> Scene | None:
    """The scene without one of its adjuncts, which it entails."""
    role = other(rng, [r for r in ("place", "time", "manner") if getattr(sc.event, r)])
    return sc._replace(event=sc.event._replace(**{role: ""})) if role else None


def things(sc: Scene) -> set[str]:
    """What two scenes must not share to be called unrelated: agents, actions, objects and extras."""
    found = {str(sc.x[k]) for k in ("a", "b", "term", "pair") if k in sc.x}
    found |= {sc.x[k].noun.words for k in "BXC" if k in sc.x}
    return found | {sc.event.who.noun.words, sc.event.frame.verb, sc.event.obj.noun.words} if sc.event else found


class Maker:
    """Draws pairs whose sentences are all new. A pair is the family, the topic and two or three sentences."""

    def __init__(self, seed: int) -> None:
        self.seed, self.rng = seed, random.Random(seed)
        self.used: set[str] = set()
        self.names = [name for name, family in families().items() for _ in range(family.share)]

    def scene(self, split: str, topic: Topic | None = None, name: str | None = None) -> Scene | None:
        sc = new_scene(self.rng, topic or pick(self.rng, lexicon()), name or pick(self.rng, self.names))
        return sc if sc and split_of(self.seed, sc) == split else None

    def say(self, sc: Scene | None, n: int = 1) -> list[str]:
        return realise(self.rng, sc, n) if sc else []

    def take(self, sc: Scene, texts: list[str]) -> tuple[str, str, list[str]] | None:
        """The pair if there are two or more sentences, all new and different; they then count as used."""
        keys = {bare(t) for t in texts}
        if not 1 < len(texts) == len(keys) or keys & self.used:
            return None
        self.used |= keys
        return sc.family, sc.topic.name, texts

    def train_pair(self, _: int) -> tuple[str, str, list[str]] | None:
        """[anchor, positive] or, for about half of them, [anchor, positive, hard negative]."""
        first = sc = self.scene("train")
        if sc is None:
            return None
        texts = self.say(sc, 2)
        if sc.family in ANSWERS and sc.kind != "why" and self.rng.random() < 0.5:
            sc = sc._replace(family=ANSWERS[sc.family], kind="0")
            texts[1:] = self.say(sc)
        elif sc.family in ("statement", "caption", "passage") and self.rng.random() < 0.15:
            texts[1:] = self.say(dropped(self.rng, sc))
        if self.rng.random() < 0.65:
            changed = edit(self.rng, sc, 3 if self.rng.random() < 0.75 else 2)
            if changed and split_of(self.seed, changed) == "train":
                texts += self.say(changed)
        return self.take(first, texts)

    def graded_pair(self, split: str, grade: int) -> tuple[str, str, list[str]] | None:
        """Two sentences of one split whose similarity is grade."""
        sc = self.scene(split)
        if sc is None:
            return None
        if grade == 5:
            return self.take(sc, self.say(sc, 2))
        # Few edits stay in a small split, so each scene gets several.
        partners = filter(None, (self.partner(sc, split, grade) for _ in range(30)))
        return self.take(sc, self.say(sc) + self.say(next(partners, None)))

    def partner(self, sc: Scene, split: str, grade: int) -> Scene | None:
        """A scene of the same split whose similarity to sc is grade (0 to 4), or None."""
        if grade > 1:
            found = edit(self.rng, sc, grade)
            return found if found and split_of(self.seed, found) == split else None
        topic = sc.topic if grade else other(self.rng, lexicon(), sc.topic)
        found = self.scene(split, topic, sc.family if self.rng.random() < 0.5 else None)
        return found if found and not things(sc) & things(found) else None


def collect(n: int, draw: Callable[[int], Any]) -> list[Any]:
    """n results of draw(index). Raises ValueError when the lexicon has hardly anything new left to say."""
    out: list[Any] = []
    misses = 0
    while len(out) < n:
        found = draw(len(out))
        out += [found] if found else []
        misses = 0 if found else misses + 1
        if misses > 2000:
            raise ValueError(f"only {len(out)} of {n} pairs can be made without repeating a sentence")
    return out


def make(pairs: int, seed: int) -> tuple[dict[str, str], dict[str, Any]]:
    """Texts of the files by split, and the counts. Raises ValueError if pairs is more than can be made."""
    maker, texts = Maker(seed), {}
    for split, n in EVAL_ROWS.items():
        rows = collect(n, lambda i: maker.graded_pair(split, i % 6))
        lines = [f"{a}\t{b}\t{i % 6:.1f}\n" for i, (_, _, (a, b)) in enumerate(rows)]
        texts[split] = "".join(sorted(lines, key=lambda _: maker.rng.random()))
    rows = collect(pairs, maker.train_pair)
    texts["train"] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for _, _, row in rows)
    sentences = [text for _, _, row in rows for text in row]
    words = [len(text.split()) for text in sentences]
    return texts, {
        "pairs": pairs, "with_hard_negative": sum(len(row) == 3 for _, _, row in rows),
        "distinct_sentences": len(set(map(bare, sentences))), "topics": len({topic for _, topic, _ in rows}),
        "constructions": len({family for family, _, _ in rows}),
        "words": {"mean": round(sum(words) / len(words), 1), "min": min(words), "max": max(words)},
        "dev_pairs": EVAL_ROWS["dev"], "test_pairs": EVAL_ROWS["test"]}


def write(path: Path, data: bytes) -> None:
    """Write a file in one step, so that no reader ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    os.replace(part, path)


def gzipped(text: str) -> bytes:
    """Gzip without name or time; the bytes depend on the text and on the zlib build only."""
    out = io.BytesIO()
    with gzip.GzipFile("", "wb", 9, out, mtime=0) as f:
        f.write(text.encode())
    return out.getvalue()


def made_before(root: Path, wanted: dict[str, Any], force: bool) -> dict[str, Any] | None:
    """The record of a complete earlier run with the wanted arguments; None if the files are yet to be made.

    Raises ValueError if root holds files of others or, without force, of other arguments or changed since.
    """
    try:
        record = json.loads((root / RECORD).read_bytes())
        ours, files = record["made_by"] == wanted["made_by"], record["files"]
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        strange = [p for p in sorted(root.rglob("*")) if p.is_file() and p.suffix != ".part"]
        if strange:
            raise ValueError(f"{root} holds files not made by this script, such as {strange[0].relative_to(root)}")
    if not ours or force or not all((root / name).is_file() for name in files):
        return None
    if any(record.get(k) != v for k, v in wanted.items()):
        raise ValueError(f"{root} was made with seed {record.get('seed')}, {record.get('pairs')} pairs and version"
                         f" {record.get('version')}; --force makes it anew")
    for name, info in files.items():
        if hashlib.sha256((root / name).read_bytes()).hexdigest() != info["sha256"]:
            raise ValueError(f"{root / name} was changed after it was made; --force makes it anew")
    return record


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        description="Make a seeded corpus of English sentence pairs for training and graded pairs for evaluation.",
        epilog=f"Writes {', '.join(FILES.values())} and {RECORD} below the output folder. A train line is the JSON"
        " list [anchor, positive] or [anchor, positive, hard negative]; an evaluation line is sentence, sentence and"
        " score, 0 (unrelated) to 5 (same meaning), separated by tabs. Equal arguments give equal files.")
    parser.add_argument("--output_dir", type=Path, default=Path("data/generated"),
                        help="folder to write to, made if missing (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=30000, help="number of training lines (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the generator (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument("--force", action="store_true", help="rewrite files that this script made before")
    args = parser.parse_args(argv)
    if args.pairs < 1 or args.seed < 0:
        parser.error("--pairs must be at least 1" if args.pairs < 1 else "--seed must not be negative")
    root = args.output_dir
    record: dict[str, Any] = {"made_by": "make_corpus.py", "version": VERSION, "seed": args.seed, "pairs": args.pairs}
    try:
        before = made_before(root, record, args.force)
        if before is None:
            root.mkdir(parents=True, exist_ok=True)
            # A folder that cannot be written should fail before the slow part.
            (root / (RECORD + ".part")).write_bytes(b"")
            texts, record["counts"] = make(args.pairs, args.seed)
            data = {FILES[split]: gzipped(text) for split, text in texts.items()}
            record["files"] = {name: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()}
                               for name, d in data.items()}
            # The record goes first: a run that is cut short then leaves a folder that is still known to be ours.
            for name, d in {RECORD: (json.dumps(record, indent=2) + "\n").encode(), **data}.items():
                write(root / name, d)
    except OSError as error:
        parser.error(f"cannot use {error.filename or root}: {error.strerror or error}")
    except ValueError as error:
        parser.error(str(error))
    record = before or record
    if args.json:
        print(json.dumps({**record, "written": before is None}, indent=2))
        return 0
    if before:
        print(f"{root} already holds these files, nothing to do")
    for name, value in record["counts"].items():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else f"{value:,}"
        print(f"{name.replace('_', ' '):<20}{text}")
    for name, info in record["files"].items():
        print(f"{root / name}  {info['bytes']:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
