#!/usr/bin/env python3
"""Make a seeded corpus of English sentence pairs with graded similarity, without any download.

A scene (who does what to what, where and when; a cause and its effect; a comparison; a definition) is
sampled from small topic lexicons whose slots fit each other, then put into words. Two wordings of one
scene are a positive pair; a wording of an edited scene is a hard negative or a lower grade.
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
from typing import Any, NamedTuple

VERSION = 1
EVAL_ROWS = {"dev": 1500, "test": 1379}
FILES = {"train": "train/generated.jsonl.gz", "dev": "sts/generated-dev.tsv.gz",
         "test": "sts/generated-test.tsv.gz"}
RECORD = "generated.json"

# who/it: people/other agents @ places @ past times (only those, if given); do: verb/opposite > objects
# [adjectives]; kit: things to hand over or count; cmp: things : qualities; def: term = meaning;
# why: cause => effect. "|" joins synonyms, "{a|b}" does so inside a text, "<a/b>" is a choice that
# changes the meaning, "*verb" and "+verb" are singular and plural verbs. Noun marks: ~ mass,
# ^ plural only, ! always "the", * a person.
LEXICON = """
# cooking open
who chef|cook, baker, kitchen assistant|kitchen helper @ in the kitchen, at the restaurant, in the school cafeteria
do chop|cut up > onion, carrot, mushroom [large|big, fresh]; peel > potato, apple, orange [small|little, ripe];
  bake/burn > cake, pie, pizza, loaf of bread [large|big, small|little]; boil > egg, potato, rice~, pasta~;
  grill/freeze > steak, sausage, chicken breast; serve > salad, dessert, soup~; wash|clean > plate, pan, glass [dirty]
kit wooden spoon, knife, mixing bowl, cookbook|recipe book, cutting board|chopping board
cmp soup, stew, curry, sauce : spicy, salty, thick, hot, tasty
def whisk = a kitchen {tool|utensil} for beating eggs; recipe = a list of steps for {making|preparing} a dish;
  oven = {an appliance|a device} for baking and roasting food; dough~ = a mixture of flour and water for making bread
why the <oven/grill> *be too hot => the <bread/pie/pizza> *burn; the <soup/sauce/stew> *be too salty => the guests +complain;
  the <cream/milk/butter> *stand in the sun => the dessert *spoil; the <dough/batter> *be too dry => the cake *fall apart
# sport open
who player, team captain, young athlete, goalkeeper|goalie @ in the stadium|at the stadium, at the sports club, in the park
do kick/catch > ball, penalty; win/lose > match|game, race, tournament|competition [important, difficult|hard];
  break > world record, club record, school record [old]; lift|raise/drop > trophy, weight, silver cup [heavy];
  ride > bicycle|bike, horse, mountain bike; run > around the track, along the river, up the hill; train|practice > for the race, with a new coach
kit ball, helmet, tennis racket, whistle, medal, stopwatch
cmp home team, visiting team|guest team, youth team, national team : strong, fast, experienced, successful, popular
def referee = {a person|someone} who makes sure that players follow the rules; marathon = a {running race|run} of about 42 kilometers;
  hat trick = three goals by one player in one game; relay = a race in which team members {take turns|run one after another}
why the <field/track/court> *be too wet => the <match/race> *be canceled; the <captain/striker/goalkeeper> *be injured => the team *lose the final;
  the players +train every day => the team *become stronger; the <coach/referee> *arrive late => the game *start an hour later
# weather
it storm, hurricane, tornado|twister, flood @ in the north of the country, near the coast, in the valley, in the city
do destroy|wreck/spare > house, bridge, barn [old, wooden]; damage > roof, car, fence, power line; block > road, tunnel, railway line;
  sweep away|carry away > boat, tree, wooden hut; hit|strike/miss > town, village, island [small|little, quiet]
who weather forecaster|meteorologist, scientist @ at the weather station, on the mountain, at the airport
do predict|forecast > storm, heat wave, thunderstorm, cold spell [severe|violent, sudden]; measure > temperature!, wind speed!, rainfall~;
  repair|fix/break > rain gauge, thermometer, satellite dish; publish > weather report, storm warning
kit umbrella, raincoat, thermometer, weather map, sandbag
cmp morning, afternoon, evening, night : warm, wet, windy, cloudy, cold
def drought = a long {time|period} without rain; tornado = a violent {column of turning air|whirling column of air};
  humidity~ = the amount of water {vapor in the air|in the air}; thermometer = an instrument that {measures|shows} temperature
why the temperature *fall below zero => the <lake/pond/river> *freeze; the wind *get stronger => the <ferry/flight/boat trip> *be canceled;
  the <rain/storm> *last all night => the river *flood the <fields/village/town>; the sun *come out => the <snow/ice> *melt
# medicine
who doctor|physician, nurse, medical student @ in the hospital|at the hospital, at the clinic, in the emergency room
do treat|care for > patient*, child*, soldier* [sick|ill, injured|hurt]; examine|check > patient*, X-ray, eye, knee;
  clean|disinfect > wound, cut, needle [small|little, deep]; calm|reassure/frighten|scare > patient*, visitor*, boy* [nervous|anxious];
  order/cancel > blood test, operation|surgery, checkup; bandage > wound, arm, foot, ankle [swollen, injured|hurt]
kit syringe, bandage, wheelchair, stethoscope, blanket, thermometer
cmp tablet|pill, syrup, injection, new treatment : effective, expensive, safe, strong
def fever = a body temperature that is {higher than normal|above normal}; vaccine = a {substance|product} that protects people from a disease;
  surgeon = a doctor who {performs|carries out} operations; pharmacy = a {shop|store} where medicines are sold
why the <patient/child> *have a high fever => the <doctor/nurse> *prescribe medicine; the <wound/cut> *become infected => the doctor *prescribe antibiotics;
  the <man/woman> *break a leg => the ambulance *come immediately; the <boy/girl> *eat too much candy => the dentist *find a cavity
# travel open
who tourist, traveler, tour guide, backpacker @ in Rome, in Japan, at the airport, in the old town
do visit > museum, castle, temple, market [famous|well-known, ancient]; book|reserve/cancel > hotel room, flight, boat trip [cheap|inexpensive];
  pack/unpack > suitcase, backpack, bag [large|big, heavy]; miss/catch > train, bus, ferry [first, last];
  photograph > statue, bridge, tower, sunset [beautiful|lovely]; rent|hire/return > car, boat, scooter; lose/find > passport, ticket, map
kit map, guidebook|travel guide, suitcase, passport, ticket, camera
cmp hotel, hostel, campsite, guesthouse : expensive, comfortable, clean, quiet, modern
def passport = {an official document|a document} for traveling to other countries; souvenir = {a thing|an object} that people keep to remember a trip;
  hostel = a {cheap|low-cost} place where travelers can sleep; visa = {an official permit|a permit} to enter a country
why the <train/bus/ferry> *be late => the <tourists/students> +miss the flight; the <hotel/hostel> *be full => the travelers +sleep in a tent;
  the <woman/man> *lose the passport => the trip *end early; the <road/bridge> *be closed => the bus *take another route
# law
who judge, magistrate @ in court|in the courtroom, in the capital
do dismiss|reject/accept > appeal, claim, complaint; overturn|reverse/uphold|confirm > verdict, conviction, sentence [controversial];
  postpone|delay > hearing, trial [important]; question > witness*, expert*; release|free/jail|imprison > suspect*, activist*, hacker*
who police officer, detective @ near the station, in the old town, at the harbor
do arrest|detain/release|set free > thief*, suspect*, burglar* [dangerous]; question|interview > witness*, driver*, shop owner*;
  search > house, car, office, warehouse [empty, abandoned]; find|discover > weapon, fingerprint, stolen car, clue
kit contract, court order, law book, police badge
cmp first trial, second trial, civil case, criminal case : long, complicated, expensive, interesting
def witness = a person who {saw|observed} a crime or an accident; contract = {a legal agreement|an agreement} between two or more parties;
  verdict = the {decision|judgment} of a jury or a judge; alibi = {proof|evidence} that someone was in another place during a crime
why the <witness/expert> *change the story => the judge *stop the trial; the <lawyer/prosecutor> *be sick => the hearing *be postponed;
  the <thief/burglar> *leave fingerprints => the police +solve the case; the <company/seller> *break the contract => the customer *go to court
# software open
who programmer|developer, software engineer, intern, data scientist @ at the office, at home, on the test server
do fix|repair/cause > bug, memory leak, crash [serious, strange|odd]; write/delete|remove > script, function, unit test [short, simple];
  install/uninstall > program, driver, plug-in [new]; restart|reboot/shut down > server, computer, database [slow, old];
  update|upgrade > website, library, app; review/ignore > patch, pull request, design document
kit laptop, keyboard, monitor|screen, USB stick, charger, user manual
cmp new version, old version, mobile app, desktop program : fast, stable, secure, easy to use, popular
def compiler = a program that {translates|turns} source code into machine code; bug = {a mistake|an error} in a program;
  database = an organized {collection|store} of data on a computer; password = a secret word {that gives|for gaining} access to an account
why the <server/database> *be overloaded => the <website/app> *crash; the <password/key> *be too short => the account *be hacked;
  the <disk/memory> *be full => the program *stop; the <test/build> *fail => the team *delay the release
# animals
it dog, cat, fox, wolf @ in the forest|in the woods, on the farm, in the park
do chase > rabbit, squirrel, duck, mouse [small|little, white, young]; sleep > under a tree, in the sun, on the grass;
  run > across the field, through the forest|through the woods, along the beach; jump > over the fence, over the wall, into the water;
  bury/dig up > bone, toy, shoe [old]; watch|observe > bird, deer, hedgehog; drink > from the river, from a bowl
who zookeeper, vet|veterinarian, farmer @ at the zoo, in the stable, at the animal shelter
do feed > elephant, monkey, penguin, goat [hungry, young, old]; weigh > lion cub, puppy, kitten, turtle; wash|clean > pony, dog, donkey [dirty];
  rescue|save > bird, horse, kitten [injured|hurt, scared|frightened]; catch/release|set free > snake, parrot, raccoon [wild]
kit leash, water bowl, cage, blanket, bag of dog food
cmp elephant, horse, wolf, rabbit : fast, heavy, strong, shy, intelligent
def mammal = an animal that {feeds|nourishes} its young with milk; predator = an animal that {hunts|kills} other animals for food;
  puppy = a {young|baby} dog; nest = a {structure|place} where birds lay their eggs
why the <dog/puppy> *hear a loud noise => the <cat/chicken/rabbit> *run away; the <gate/cage> *be open => the <monkey/goat> *escape;
  the winter *be very cold => the <birds/bears> +move to the south; the <horse/pony> *be tired => the rider *take a break
# music open
who musician, student, street performer, music teacher @ on the stage|on stage, in the studio, at the festival
do play > guitar, violin, piano, trumpet [old, expensive|costly]; write|compose > song, melody, opera [short, sad];
  record/delete > album, song, drum solo [new]; tune > guitar, harp, cello; sing > song, lullaby, folk song [cheerful|happy, sad];
  buy|purchase/sell > drum, flute, amplifier [old, small|little]; rehearse|practice > piece, duet, solo [difficult|hard]
kit guitar, microphone, music stand, violin, loudspeaker|speaker, songbook
cmp trumpet, violin, drum, piano : loud, expensive, heavy, popular, difficult to play
def orchestra = a large {group|ensemble} of musicians with different instruments; choir = a group of people who {sing together|sing as one group};
  melody = a {series|sequence} of notes that forms a tune; conductor = the {person|musician} who leads an orchestra
why the <singer/pianist> *be sick => the concert *be canceled; the <guitar/violin/piano> *be out of tune => the <song/piece> *sound terrible;
  the <band/choir> *practice every evening => the audience *enjoy the concert; the <drums/speakers> +be too loud => the neighbors +complain
# finance
it bank, insurance company|insurer, investment fund @ in Europe, in the city, in Asia
do raise|increase/lower|reduce > fee, interest rate, price; buy|purchase/sell > share, office building, bond [expensive|costly, cheap|inexpensive];
  approve/reject|turn down > loan, application, mortgage [large|big, small|little]; open/close|shut > account, branch, call center [new]
who accountant, investor, customer, shop owner @ at the bank, in the office, in town
do pay|settle > bill, invoice, fine [large|big, old]; check > bank statement, receipt, budget!; sell/buy|purchase > share, apartment|flat, gold coin;
  open/close > savings account, business account; sign/tear up > check, contract, loan agreement
kit check, credit card, gold coin, invoice, receipt
cmp first loan, second loan, savings plan, pension fund : expensive, safe, risky, profitable
def inflation~ = a general {rise|increase} in prices; budget = a plan for {earning|receiving} and spending money;
  mortgage = a loan for {buying|the purchase of} a house; dividend = a part of a profit that is {paid|given} to shareholders
why the <price of oil/interest rate> *rise => the <tickets/houses> +become more expensive; the <company/bank> *make a loss => the share price *fall;
  the <customer/farmer> *lose the job => the bank *reject the loan; the <government/city> *lower taxes => the shops +sell more
# school open
who teacher, professor, tutor @ at school|in school, in the classroom, at the university
do explain > rule, theorem, poem [difficult|hard, new]; grade|mark/lose > test, essay, exam [long, short]; praise/punish > class, student*, child* [quiet, shy];
  prepare/cancel > lesson, field trip, lecture [interesting, first]; correct > mistake, spelling error, report
who student|pupil, girl, boy @ at school|in school, in the library, at home
do pass/fail > exam, test, driving test [important, difficult|hard]; finish|complete/start|begin > project, essay, worksheet [long, short];
  solve > equation, puzzle, math problem [tricky, easy|simple]; borrow/return > book, dictionary, calculator; learn/forget > poem, song, formula
kit textbook, ruler, pencil case, notebook|exercise book, dictionary, calculator
cmp math test, history exam, physics course, English class : difficult, long, interesting, popular
def dictionary = a book that {lists|collects} words and their meanings; semester = {half of|one half of} a school year;
  noun = a word that {names|stands for} a person or a thing; scholarship = money that {helps a student pay|is given to a student to pay} for school
why the <teacher/professor> *be sick => the <lesson/exam> *be canceled; the <boy/girl/student> *study hard => the exam *be easy;
  the <bus/train> *break down => the children +be late for school; the <classroom/library> *be noisy => the students +go outside
# gardening open
who gardener, neighbor, landscaper @ in the garden, behind the house, in the greenhouse
do plant/dig up > tree, rose bush, tulip, tomato plant [small|little, young]; water > flower, plant, herb, vegetable bed [dry, young];
  prune|trim > hedge, apple tree, vine [tall, old]; pick/throw away > tomato, strawberry, pear, cucumber [ripe, red, small|little];
  mow|cut > lawn!, meadow; remove|pull out > weed, bush, root [dead, thick]; build > shed, compost bin, fence
kit shovel|spade, watering can, rake, flowerpot, pair of gloves, wheelbarrow
cmp oak, rose bush, apple tree, hedge : tall, old, thick, healthy
def greenhouse = a glass building {for growing plants|in which plants are grown}; weed = a {wild plant|plant} that nobody wants in a garden;
  compost~ = {rotted|decayed} plant material that feeds the soil; seed = {the small part of a plant|a plant part} from which a new plant grows
why the <summer/spring> *be very dry => the <flowers/roses/tomatoes> +die; the <rabbit/snail> *find the garden => the lettuce *disappear;
  the <soil/ground> *be frozen => the gardener *wait until March; the <apple tree/plum tree> *get enough sun => the fruit *taste sweet
# history
who king, queen, emperor, duke @ in the north, near the border, in the east @ in the 12th century, in 1450, long ago|a very long time ago, after the war, in ancient times|in antiquity
do conquer|capture/lose > city, fortress, island [rich|wealthy, large|big]; build/destroy > castle, temple, palace [magnificent|splendid];
  sign/break > treaty, peace agreement; invade > kingdom, province [small|little]; free|release/execute > prisoner*, rebel*, knight*; found > university, city, monastery
who archaeologist, historian, museum director @ near the river, in Egypt, under the old church
do discover|find > tomb, coin, sword, skeleton [ancient, Roman]; study > map, letter, manuscript [old, rare]; translate > inscription, scroll, diary;
  restore|repair/damage > vase, mosaic, statue [broken, ancient]; buy|purchase/sell > painting, helmet, crown [medieval]
kit ancient coin, old map, bronze sword, clay pot, stone tablet
cmp castle, cathedral, temple, palace : old, large, tall, famous
def castle = a large building with thick walls that {protected|defended} its owners; treaty = {an agreement|a formal agreement} between countries;
  emperor = the {ruler|head} of an empire; archaeologist = a {person|scientist} who studies objects from the past
why the <harvest/winter> *be terrible => the people +rise against the king; the <king/queen> *die without an heir => a civil war *begin;
  the <army/fleet> *be too weak => the <city/island> *fall; the <castle/bridge> *be destroyed => the trade *stop
# physics
who physicist, researcher|scientist, lab assistant @ in the laboratory|in the lab, at the university, at the research center
do measure > voltage!, pressure!, weight!; heat/cool > liquid, gas, metal rod [cold, thin]; test > theory, hypothesis, prototype [new, simple];
  repeat|redo/cancel > experiment, measurement [important, first]; observe|watch > particle, chemical reaction, magnetic field [strange|odd];
  build/take apart > laser, telescope, detector [small|little, powerful]; publish > paper, article, study
kit microscope, magnet, lens, battery, test tube
cmp copper wire, iron bar, glass plate, plastic tube : heavy, thick, warm, strong, long
def gravity~ = the force that {pulls|draws} objects toward the earth; atom = the smallest {unit|part} of an element; magnet = {an object|a thing} that attracts iron;
  vacuum = a space that {contains no matter|has no matter in it}; microscope = an instrument that makes small things {look larger|appear bigger}
why the <metal/wire> *get hot => the <rod/bar/rail> *expand; the <water/liquid> *reach the boiling point => the steam *lift the lid;
  the <magnet/battery> *be too weak => the motor *stop; the <lens/mirror> *be dirty => the image *become blurred
# family open
who mother|mom, father|dad, aunt, babysitter @ at home, in the living room, at the playground
do feed > baby*, toddler*, cat [hungry]; comfort|console/scold > child*, little boy*, little girl* [sad|unhappy, tired]; read > story, letter, fairy tale [long, funny];
  hide/find > key, present|gift, toy [small|little]; wash/lose > blanket, sweater, sock [warm, old]; plan|organize/cancel > birthday party, picnic, family trip;
  lock/unlock > door!, car, bicycle|bike; hug > baby*, grandmother*, friend*
kit present|gift, toy, photo album, teddy bear, birthday card
cmp older brother, younger sister, uncle, cousin : tall, shy, patient, funny
def nephew = the son of {a brother or a sister|one's brother or sister}; twins^ = two children {who were born|born} at the same birth;
  orphan = a child {whose parents are dead|without living parents}; wedding = a {ceremony|celebration} in which two people get married
why the <baby/boy/girl> *be hungry => the <mother/father> *make dinner; the <dog/thunder> *wake the baby => the parents +get no sleep;
  the <grandmother/uncle> *come to visit => the children +be happy; the <son/daughter> *be sick => the family *stay at home
# shopping open
who customer|shopper, tourist, young couple @ at the mall|at the shopping center, in the supermarket, at the market, online|on the internet
do buy|purchase/sell > jacket, lamp, pair of shoes [blue, cheap|inexpensive, expensive|costly]; return|bring back/keep > coat, toaster, phone [broken, new];
  compare > price, brand, discount; order/cancel > book, sofa|couch, bicycle|bike [large|big, red]; choose|pick/ignore > hat, ring, carpet [small|little, colorful];
  pay for > meal, dress, television|TV
kit shopping bag, gift card, basket, price tag, receipt
cmp supermarket, corner shop|corner store, department store, flea market : expensive, large, crowded, modern
def discount = {a reduction|a cut} in the usual price; receipt = a piece of paper that {proves|shows} that something was paid for;
  cashier = a person who {takes|collects} the money in a shop; warranty = a promise to {repair or replace|fix or exchange} a faulty product
why the <shoes/jackets/phones> +be on sale => the <customers/tourists> +buy more; the <shop/market> *close early => the family *go home without food;
  the <coat/dress> *be too small => the woman *return it; the <card/app> *be blocked => the man *pay in cash
# news
who journalist|reporter, editor, news photographer @ in Berlin, at the press conference, in the newsroom
do interview > mayor*, athlete*, survivor* [famous|well-known, young]; publish/withdraw > article, photo, report [long, shocking]; check|verify > fact, rumor, source;
  write > headline, story, editorial [short, critical]; film|record > protest, speech, parade [large|big, long]; expose|uncover/hide > scandal, lie, fraud
kit camera, newspaper, press pass, microphone, voice recorder
cmp newspaper, magazine, radio station, news website : reliable, popular, old, critical
def headline = the {title|heading} of a newspaper article; editor = a person who {decides|chooses} what is published;
  rumor = a story that {may not be true|is not confirmed}; press conference = a meeting where journalists {ask questions|can ask questions}
why the <minister/mayor> *resign => the newspapers +print a special edition; the <report/article> *be false => the editor *apologize to the readers;
  the <satellite link/microphone> *fail => the interview *be stopped; the reporter *discover a <scandal/lie> => the director *lose the job
# construction open
who builder|construction worker, carpenter, roofer, plumber @ at the construction site|on the building site, in the old town, next to the station
do build/demolish|tear down > house, wall, garage [small|little, high]; repair|fix/damage > roof, pipe, staircase [old, broken]; install/remove > door, window, sink [new, large|big];
  paint > fence, ceiling, front door [white, old]; measure > room, beam, floor; load/unload > truck, van, trailer [heavy]; saw > plank, board, log [long, thick]
kit hammer, ladder, toolbox, drill, bag of cement, hard hat
cmp brick house, wooden cabin, office tower, stone bridge : tall, expensive, stable, modern, old
def crane = a machine {for lifting|that lifts} heavy loads; scaffold = a {temporary|short-term} platform for workers on a building;
  architect = a person who {designs|plans} buildings; foundation = the {base|lowest part} that carries a building
why the <cement/paint> *be wet => the workers +wait until the afternoon; the <ladder/crane> *be damaged => the work *stop;
  the <roof/pipe> *leak => the <kitchen/cellar> *fill with water; the <money/wood> *run out => the builder *leave the house unfinished
# ocean
it shark, dolphin, whale, octopus @ near the island, in the Pacific, off the coast of Australia
do follow > boat, ship, swimmer*, fishing net [small|little, slow]; attack/avoid > seal, diver*, turtle [young, large|big]; swim > under the boat, around the reef, toward the beach;
  catch > fish, crab, squid [small|little, silver]; dive > into deep water, under the ice, down to the wreck
who diver, marine biologist, sailor, fisherman @ near the reef, in the harbor, on the open sea|out at sea
do photograph > coral reef, jellyfish, sea turtle [rare, colorful, large|big]; rescue|save > swimmer*, dolphin, child* [tired|exhausted, injured|hurt];
  repair|fix/sink > boat, yacht, raft [old, wooden]; explore > cave, shipwreck, lagoon [deep, mysterious]; study > whale, plankton~, ocean current; lower/raise|hoist > anchor, sail, net [heavy, large|big]
kit life jacket, fishing net, diving mask, rope, lantern
cmp whale, shark, dolphin, sea turtle : large, fast, intelligent, dangerous
def tide = the {rise and fall|rising and falling} of the sea; reef = a {ridge|line} of rock or coral near the surface of the sea;
  harbor = a {safe|protected} place for ships near the land; plankton~ = {tiny|very small} organisms that drift in the sea
why the <sea/water> *be too rough => the <fishermen/divers> +stay in the harbor; the <ship/tanker> *hit a rock => the oil *pollute the beach;
  the water *get warmer => the <corals/fish> +die; the <anchor/rope> *break => the boat *drift away
# space
it space probe|spacecraft, rover, satellite @ near Mars, on the far side of the moon, in orbit
do photograph > crater, moon, comet [large|big, icy, distant]; collect/lose > rock sample, dust sample [small|little, red]; send|transmit > signal, image, message [weak, clear];
  explore > canyon, asteroid, ice field [deep, frozen]; detect > magnetic field, gas cloud, radio wave [strong, distant]
who astronaut, astronomer, space engineer @ at the space center, at the observatory, at the control center
do study > planet, galaxy, black hole [distant, giant]; discover|find > star, exoplanet, comet [new, bright]; launch/destroy > rocket, satellite, balloon [new, powerful];
  repair|fix/break > solar panel, antenna, telescope [large|big, old]; test/ignore > space suit, engine, landing system
kit telescope, space suit, moon rock, star map, oxygen tank
cmp earth, moon, planet Mars, sun : large, hot, bright, heavy
def orbit = the {path|course} of an object around a planet or a star; galaxy = a {huge|very large} group of stars; eclipse = the {moment|event} when the moon hides the sun;
  astronaut = a person who {travels|flies} into space; crater = a large hole that {was made|is made} by a falling rock
why the <engine/computer> *fail => the <rocket/probe> *miss the planet; the <sky/night> *be cloudy => the astronomers +see nothing;
  the <battery/solar panel> *freeze => the rover *lose power; the <weather/wind> *improve => the launch *take place
# traffic open
who driver|motorist, cyclist|bike rider, truck driver @ on the highway|on the motorway, in the city center|downtown, near the school, at the intersection|at the crossroads
do pass|overtake > bus, truck, tractor [slow, red]; cross > bridge, street, railway line [busy, wide]; ignore/notice > red light, stop sign, speed limit; clean|wash > car, van, windshield [dirty];
  park > car, motorcycle|motorbike, van [white, small|little]; hit|strike/avoid > tree, wall, deer; repair|fix > tire, brake, headlight [broken]
kit helmet, traffic cone, road map, bicycle lock, spare tire
cmp bus, train, car, bicycle|bike : fast, expensive, comfortable, safe, noisy
def detour = a longer {route|way} around a closed road; roundabout = a {circular|round} junction for traffic; traffic jam = a long {line|queue} of cars that can hardly move;
  pedestrian = a person who {is walking|goes on foot} in the street
why the <bridge/tunnel> *be closed => the traffic *come to a stop; the road *be icy => the <bus/truck/car> *slide into the ditch;
  the <driver/cyclist> *ignore the red light => the police +stop the traffic; the <tire/engine> *explode => the driver *lose control
# art open
who painter|artist, sculptor, art student @ in the studio|in the workshop, at the gallery, in Florence
do paint > portrait, landscape, mural [large|big, colorful, small|little]; carve > statue, mask, bowl [wooden, small|little]; sell/buy|purchase > painting, sculpture, drawing [expensive|costly, famous|well-known];
  draw|sketch > face, horse, old church, tree; exhibit|display/hide > photograph, vase, portrait [beautiful|lovely, strange|odd]; finish|complete/destroy > painting, sculpture, sketch [large|big]
kit paintbrush, canvas, picture frame, sketchbook, tube of paint
cmp painting, statue, photograph, drawing : beautiful, valuable, old, large, famous
def portrait = a picture {of a person|that shows a person}; palette = a board {on which a painter mixes|for mixing} colors; gallery = a {place|building} where art is shown;
  sculpture = a work of art {carved or shaped|made} from stone, metal or wood
why the <painting/vase> *be a fake => the museum *ask for the money back; the <light/sun> *be too strong => the colors +fade;
  the <artist/sculptor> *become famous => the prices +rise; the <paint/clay> *be too dry => the artist *add some water
# politics
who mayor, minister, governor, senator @ in the capital, at the town hall, in front of the parliament
do propose/oppose > law, reform, tax cut [new, strict, unpopular]; open/close|shut > hospital, school, airport [new, modern]; sign/reject|turn down > bill, petition, agreement [important];
  announce > election, budget cut, strike; criticize/defend > plan, decision, law [controversial, new]; meet > voter*, ambassador*, protester* [angry, young]; answer/ignore > letter, question, complaint
kit ballot box, flag, law book, campaign poster, letter
cmp government plan, opposition plan, first reform, second reform : expensive, popular, fair, complicated
def election = a vote in which people {choose|select} their leaders; tax = money that people {must pay|have to pay} to the state; veto = the {right|power} to stop a decision;
  ambassador = a person who {represents|stands for} a country abroad
why the <minister/mayor> *break a promise => the voters +choose another party; the <tax/fee> *rise => the citizens +protest in the streets;
  the <parliament/council> *reject the plan => the government *resign; the <strike/protest> *continue => the <airport/school> *stay closed
# film open
who actor|performer, director|filmmaker, film student @ in Hollywood, at the theater, on the film set
do watch/miss > movie|film, comedy, documentary [new, long, old]; rehearse|practice > scene, dance, fight scene [difficult|hard, short]; write/rewrite > script, dialogue, play [short, funny];
  win > award, prize, Oscar [important, first]; film|shoot > scene, car chase, trailer [short, long]; accept/decline|refuse > role, part, invitation [small|little, leading]
kit script, costume, movie ticket, film poster, mask
cmp movie|film, play, book, TV series : long, funny, sad, interesting, successful
def comedy = a movie or play that {makes people laugh|is meant to make people laugh}; sequel = a film that {continues|goes on with} an earlier story; audience = the people who {watch|are watching} a performance;
  subtitle = a text at the bottom of the screen that {shows|gives} what is said
why the <actor/singer> *forget the text => the audience *laugh; the <film/play> *be too long => half of the visitors +leave early;
  the <camera/projector> *break => the show *be canceled; the <movie/series> *win a prize => the director *get a new contract
# office open
who manager|boss, secretary, employee|worker, consultant @ at the office, in the meeting room|in the conference room, at the head office
do send/delete > email, report, invitation [long, short]; schedule|arrange/cancel > meeting, interview, workshop [important, short]; print/lose > document, contract, form [signed];
  hire|employ/fire|dismiss > assistant*, engineer*, designer* [young, experienced]; prepare/postpone|put off > presentation, budget plan, training course; answer/ignore > phone call, question, email
kit stapler, folder, office chair, laptop, calendar, coffee mug
cmp Monday meeting, phone call, annual report, presentation : long, important, boring, useful
def deadline = the {latest|last} time by which a task must be finished; salary = the {fixed|regular} pay for a job; colleague = a person {with whom one works|who works with you};
  promotion = a {move|rise} to a better job in the same company
why the <printer/computer> *break down => the report *be late; the <manager/director> *be on vacation => the meeting *be postponed;
  the <company/team> *reach the goal => the employees +get a bonus; the <train/elevator> *be out of order => the staff +arrive late
"""

IRREGULAR = {w[0]: (w[1], w[-1]) for w in (s.split() for s in (
    "cut; buy bought; sell sold; win won; lose lost; throw threw thrown; catch caught; break broke broken; "
    "ride rode ridden; run ran run; swim swam swum; sweep swept; strike struck; hit hit; take took taken; "
    "write wrote written; rewrite rewrote rewritten; find found; eat ate eaten; sleep slept; drink drank drunk; "
    "sing sang sung; read read; pay paid; draw drew drawn; build built; dig dug; feed fed; hide hid hidden; "
    "bring brought; put put; leave left; choose chose chosen; fall fell fallen; freeze froze frozen; get got; "
    "become became become; have had; make made; rise rose risen; spend spent; set set; shut shut; sink sank sunk; "
    "go went gone; begin began begun; come came come; stand stood; send sent; tear tore torn; meet met; keep kept; "
    "shoot shot; redo redid redone; hear heard; see saw seen; overtake overtook overtaken; wake woke woken; "
    "withdraw withdrew withdrawn; uphold upheld; cut cut").split("; ")) if len(w) > 1}
PLURALS = {"man": "men", "woman": "women", "child": "children", "knife": "knives", "loaf": "loaves",
           "mouse": "mice", "thief": "thieves", "potato": "potatoes", "tomato": "tomatoes", "fish": "fish",
           "deer": "deer", "foot": "feet", "wolf": "wolves", "fisherman": "fishermen", "squid": "squid",
           "jellyfish": "jellyfish", "plankton": "plankton", "spacecraft": "spacecraft",
           "hypothesis": "hypotheses", "X-ray": "X-rays", "postman": "postmen"}
ANTONYMS = {"hot": "cold", "spicy": "mild", "thick": "thin", "strong": "weak", "fast": "slow", "warm": "cold",
            "wet": "dry", "windy": "calm", "cloudy": "sunny", "cold": "warm", "expensive": "cheap",
            "safe": "dangerous", "tall": "short", "long": "short", "large": "small", "heavy": "light",
            "loud": "quiet", "old": "new", "clean": "dirty", "quiet": "noisy", "modern": "old-fashioned",
            "difficult": "easy", "interesting": "boring", "complicated": "simple", "risky": "safe"}
NUMBERS = {2: "two|a couple of", 3: "three", 4: "four", 5: "five", 6: "six|half a dozen", 7: "seven", 8: "eight",
           9: "nine", 10: "ten", 12: "twelve|a dozen", 15: "fifteen", 20: "twenty"}
QUANTITIES = [f"{w}|{n}" for n, w in NUMBERS.items()] + ["many|a lot of|lots of", "several|a number of"]
PEOPLE = ["man", "woman", "boy", "girl", "teenager", "old man|elderly man", "old woman|elderly woman"]
NAMES = {"Anna": "she", "Tom": "he", "Maria": "she", "David": "he", "Sofia": "she", "Ahmed": "he", "Laura": "she",
         "Peter": "he", "Mei": "she", "Carlos": "he", "Olga": "she", "Kofi": "he"}
TRAITS = ["young", "tired|exhausted", "friendly|kind", "tall", "local"]
SPEAKERS = ["neighbor", "manager|boss", "visitor", "colleague|coworker", "old friend", "young woman", "reporter"]
MANNERS = ["again|once more", "for the first time", "without any help|without help from anyone",
           "with a friend|together with a friend", "in a hurry|in great haste", "very carefully|with great care"]
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
TIMES = {
    "past": ["yesterday", "last week", "last night", "last summer", "this morning|earlier this morning",
             "two weeks ago|a fortnight ago", "a week ago|seven days ago", "in March", "in October",
             "over the weekend|at the weekend", "a few days ago|some days ago", *(f"on {d}" for d in DAYS)],
    "progressive": ["right now|at the moment", "today", "this week"],
    "future": ["tomorrow", "next week", "next month", "this evening|tonight", "in two days|two days from now",
               "in an hour|an hour from now", "soon|before long", *(f"next {d}" for d in DAYS)],
    "present": ["every day|each day|daily", "every morning|each morning", "every week|once a week",
                "twice a month|two times a month", "every summer|each summer", "now and then|from time to time",
                *(f"every {d}|on {d}s" for d in DAYS)],
    "perfect": ["this week", "this year", "twice|two times", "more than once|on more than one occasion",
                "recently|lately", "today"]}

PREPOSITIONS = set("across along around behind for from in into near off on over through toward under up with "
                   "without down".split())


class Noun(NamedTuple):
    """Words for one thing ("a|b") and its kind: "" count, "~" mass, "^" plural, "!" unique, "*" person."""
    words: str
    kind: str


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
    kit: tuple[Noun, ...]
    things: tuple[str, ...]
    qualities: tuple[str, ...]
    terms: list[tuple[str, str]]
    causes: list[tuple[str, str]]


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
    obj: NP | str
    place: str
    time: str
    manner: str
    tense: str
    neg: bool = False


class Scene(NamedTuple):
    """What a sentence says: topic, family (the construction), event if any, family-specific extras."""
    topic: Topic
    family: str
    event: Event | None
    x: tuple[Any, ...] = ()


class Words(NamedTuple):
    """The event in words: subject, its number, verb, object, its number, manner, place, time."""
    s: str
    sp: bool
    v: str
    o: str
    op: bool
    m: str
    p: str
    t: str


def noun(text: str) -> Noun:
    return Noun(text.rstrip("~^!*"), text[-1] if text[-1] in "~^!*" else "")


def listed(text: str, sep: str = ",") -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(sep) if part.strip())


@functools.cache
def lexicon() -> tuple[Topic, ...]:
    """Parse LEXICON."""
    topics: list[Topic] = []
    for line in re.sub(r"\n +", " ", LEXICON).strip().splitlines():
        key, _, rest = line.partition(" ")
        if key == "#":
            name, _, is_open = rest.partition(" ")
            data: dict[str, Any] = dict(name=name, open=bool(is_open), blocks=[], terms=[], causes=[])
        elif key in ("who", "it"):
            who, *where = rest.split("@")
            head = (key == "who", tuple(map(noun, listed(who))), *map(listed, (where + [""])[:2]))
        elif key == "do":
            frames = []
            for verbs, things in (f.split(" > ") for f in listed(rest, ";")):
                things, _, adjectives = things.partition("[")
                frames.append(Frame(*(listed(verbs, "/") + ("",))[:2], tuple(map(noun, listed(things))),
                                    listed(adjectives.strip("] "))))
            data["blocks"].append(Block(*head, tuple(frames)))
        elif key == "kit":
            data["kit"] = tuple(map(noun, listed(rest)))
        elif key == "cmp":
            data["things"], data["qualities"] = map(listed, rest.split(" : "))
        elif key == "def":
            data["terms"] = [tuple(d.split(" = ")) for d in listed(rest, ";")]
        else:
            data["causes"] = [tuple(c.split(" => ")) for c in listed(rest, ";")]
            topics.append(Topic(**data))
    return tuple(topics)


def pick(rng: random.Random, seq: Sequence[Any]) -> Any:
    # Only random() is documented to give the same sequence in every Python version.
    return seq[int(rng.random() * len(seq))]


def syn(rng: random.Random, group: str) -> str:
    return pick(rng, group.split("|"))


def expand(rng: random.Random, text: str, pattern: str = r"\{([^}]*)\}", sep: str = "|") -> str:
    return re.sub(pattern, lambda m: pick(rng, m[1].split(sep)), text)


def other(rng: random.Random, seq: Iterable[Any], *used: Any) -> Any:
    """A member of seq that is not in used, or None."""
    left = [item for item in seq if item not in used]
    return pick(rng, left) if left else None


def doubles(word: str) -> bool:
    return bool(re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]", word))


def plural(text: str) -> str:
    """Plural of a noun phrase; the head is the word before " of ", else the last one."""
    head, of, rest = text.partition(" of ")
    stem, _, last = head.rpartition(" ")
    if last in PLURALS:
        last = PLURALS[last]
    elif re.search(r"(s|x|z|ch|sh)$", last):
        last += "es"
    else:
        last = re.sub(r"(?<=[^aeiou])y$", "ie", last) + "s"
    return f"{stem} {last}".strip() + of + rest


def inflect(verb: str, form: str) -> str:
    """form: base, s, past, pp or ing; only the first word changes."""
    word, space, rest = verb.partition(" ")
    if form == "s":
        word = {"have": "has", "go": "goes", "do": "does", "redo": "redoes"}.get(word) or plural(word)
    elif form == "ing":
        word = {"die": "dying"}.get(word) or (word + word[-1] if doubles(word) else re.sub(r"(?<=[^e])e$", "", word)) + "ing"
    elif form in ("past", "pp"):
        if word in IRREGULAR:
            word = IRREGULAR[word][form == "pp"]
        else:
            word = word + word[-1] if doubles(word) else re.sub(r"(?<=[^aeiou])y$", "i", word)
            word += "d" if word.endswith("e") else "ed"
    return word + space + rest


def split_verb(verb: str, tense: str, many: bool, passive: bool = False) -> tuple[str, str]:
    """Auxiliary and remainder of a finite verb: ("did", "chop"), ("is", "being chopped")."""
    if verb.startswith("be "):
        passive, pp = True, verb[3:]
    else:
        pp = inflect(verb, "pp")
    was, is_, has = ("were", "are", "have") if many else ("was", "is", "has")
    if passive:
        return {"past": (was, pp), "present": (is_, pp), "progressive": (is_, "being " + pp), "base": ("be", pp),
                "future": ("will", "be " + pp), "perfect": (has, "been " + pp), "would": ("would", "be " + pp),
                "pluperfect": ("had", "been " + pp)}[tense]
    return {"past": ("did", verb), "present": ("do" if many else "does", verb), "base": ("", verb),
            "progressive": (is_, inflect(verb, "ing")), "future": ("will", verb), "perfect": (has, pp),
            "would": ("would", verb), "pluperfect": ("had", pp)}[tense]


def finite(verb: str, tense: str, many: bool, neg: bool = False, passive: bool = False) -> str:
    aux, rest = split_verb(verb, tense, many, passive)
    if neg:
        return f"{aux} not {rest}"
    if aux in ("did", "do", "does"):
        return inflect(verb, "past" if aux == "did" else "base" if many else "s")
    return f"{aux} {rest}".strip()


def article(text: str) -> str:
    vowel = re.match(r"[aeiouAEIOU]|X-ray|8|11\b|18\b|hour|honest|heir", text)
    return ("an " if vowel and not re.match(r"uni[^nmd]|use|Eu|USB|one\b", text) else "a ") + text


def comparative(adj: str) -> str:
    word, _, rest = adj.partition(" ")
    if word == "tasty" or len(re.findall(r"[aeiouy]+", word.rstrip("e"))) == 1 or word.endswith("y"):
        word = word + word[-1] if doubles(word) else re.sub(r"y$", "i", word)
        return f"{word.rstrip('e')}er {rest}".strip()
    return {"simple": "simpler"}.get(adj, "more " + adj)


def render(rng: random.Random, np: NP) -> str:
    words = syn(rng, np.noun.words)
    if np.noun.kind == "name":
        return words
    if np.plural and np.noun.kind != "^":
        words = plural(words)
    if np.adj:
        words = f"{syn(rng, np.adj)} {words}"
    if np.det == "a":
        return article(words)
    return f"{syn(rng, np.det).rstrip('+')} {words}".strip()


def sentence(text: str, end: str = ".") -> str:
    """Tidy spaces, spell out a leading number, capitalise and close."""
    text = re.sub(r"\s+", " ", text).strip().replace(" ,", ",").rstrip(",")
    text = re.sub(r"^\d+", lambda m: NUMBERS[int(m[0])].split("|")[0], text)
    return text[0].upper() + text[1:] + end


# In CONTROL and ORDER, V is the verb phrase, G its gerund and WAS agrees with the person; in ORDER, S speaks to A.
CONTROL = ["managed to V|succeeded in G", "failed to V|did not manage to V|WAS unable to V",
           "forgot to V|did not remember to V", "remembered to V|did not forget to V",
           "refused to V|WAS not willing to V|WAS unwilling to V", "decided to V|made the decision to V|chose to V",
           "began to V|started to V", "tried to V|attempted to V|made an attempt to V",
           "WAS allowed to V|had permission to V", "WAS forbidden to V|WAS not allowed to V|had no permission to V",
           "had to V|WAS forced to V|WAS obliged to V", "planned to V|intended to V|had plans to V",
           "enjoyed G|took pleasure in G|liked G", "hated G|strongly disliked G",
           "promised to V|gave a promise to V", "offered to V|made an offer to V",
           "WAS afraid to V|did not dare to V", "regretted G|WAS sorry about G"]
ORDER = ["S asked A to V|A WAS asked by S to V|S requested that A V", "S told A to V|S ordered A to V|A WAS told by S to V",
         "S persuaded A to V|S convinced A to V|A WAS persuaded by S to V", "S helped A to V|S helped A V|A got help from S in G",
         "S allowed A to V|S gave A permission to V|S let A V|A got permission from S to V",
         "S forbade A to V|S did not allow A to V|A WAS not allowed by S to V", "S thanked A for G|A WAS thanked by S for G",
         "S praised A for G|S complimented A on G|A WAS praised by S for G",
         "S criticized A for G|A WAS criticized by S for G|A received criticism from S for G",
         "S taught A to V|S showed A how to V|A learned from S how to V", "S paid A to V|A WAS paid by S to V",
         "S warned A not to V|A WAS warned by S not to V|S warned A against G"]
TRANSFER = ["A gave X to B|A gave B X|B got X from A|B WAS given X by A", "A sold X to B|A sold B X|B bought X from A",
            "A lent X to B|A lent B X|B borrowed X from A", "A sent X to B|A sent B X|B WAS sent X by A",
            "A showed X to B|A showed B X|B WAS shown X by A", "A returned X to B|A gave X back to B|B got X back from A",
            "A stole X from B|B WAS robbed of X by A", "A promised X to B|A promised B X|B WAS promised X by A"]
HOWTO = ["How do you V|How can I V|What is the best way to V|How should I V|What is a good way to V",
         "How long does it take to V|How much time does it take to V|How much time do you need to V",
         "How much does it cost to V|What does it cost to V|How expensive is it to V",
         "Is it hard to V|Is it difficult to V|Is G difficult", "Where can I learn to V|Where can I learn how to V",
         "Which tools do I need to V|What equipment is needed to V|What tools are needed for G",
         "Why is it important to V|What makes G important|Why does G matter",
         "When is the best time to V|What is the right time to V|When should I V",
         "Which mistakes should I avoid when G|What mistakes are common when G"]
JOB_HOWTO = ["How does A V|In what way does A V|How is it that A can V", "How long does it take A to V|How much time does A need to V",
             "Why does A V|For what reason does A V|What makes A V", "Is it hard for A to V|Is it difficult for A to V",
             "How often does A V|How frequently does A V", "Can A V without help|Is A able to V without help"]
PHRASES = ["tips for G|advice on how to V|useful hints for G", "a guide to G|instructions for G|step-by-step instructions on how to V",
           "a photo of A G|a picture showing A G|an image of A G", "the cost of G|the price of G|how much it costs to V",
           "a book about G|a book on how to V", "a plan to V|a plan for G", "a discussion about G|a conversation about G|a talk about G",
           "the dangers of G|the risks of G", "the first attempt to V|the first try at G", "problems with G|difficulties when G",
           "a dream about G|dreaming of G", "a video of A G|a short film that shows A G", "a job that involves G|a job in which you have to V"]
DEADLINES = ["", "before lunch", "by Friday|no later than Friday", "as soon as possible|right away", "tomorrow morning",
             "before the end of the day|before the day is over", "before you leave|before leaving"]
LIMITS = ["", "without permission|unless you have permission", "after dark|when it is dark", "on your own|alone",
          "when you are tired|while you are tired"]
VIEWS = ["S said that C|S stated that C|According to S, D", "S denied that C|S said it was not true that C",
         "S believed that C|S was convinced that C|S was sure that C", "S doubted that C|S was not sure whether C",
         "S asked whether C|S wanted to know if C", "S heard that C|S was told that C", "S hoped that C|It was the hope of S that C",
         "S read in the newspaper that C|S learned from the newspaper that C"]
TAILS = ["Nobody had expected this.|This came as a surprise to everyone.", "It took about two hours.|The whole thing lasted roughly two hours.",
         "A crowd of people came to watch.|Many people gathered to see it.", "It was not the first time.|The same thing had happened before.",
         "No one knows why.|The reason is still unknown.", "A neighbor took a photo of it.|It was photographed by a neighbor.",
         "The local newspaper wrote about it.|There was an article about it in the local paper.",
         "Nothing like this had happened for years.|It had been years since anything like this happened.",
         "Later, it started to rain.|Some time afterward, it began to rain.", "Fortunately, nobody was hurt.|Luckily, there were no injuries.",
         "In the end, everyone was happy.|Everybody was satisfied at the end.", "It was a cold, gray day.|The day was cold and gray."]
CAUSAL = {
    "if": "If {c:present}, {e:future}.|{e:future} if {c:present}.|If {c:present}, then {e:future}.|Should {c:base}, {e:future}.",
    "because": "{e:past} because {c:past}.|{c:past}, so {e:past}.|Because {c:past}, {e:past}.|{c:past}. As a result, {e:past}.|The reason why {e:past} was that {c:past}.",
    "although": "Although {c:past}, {e:not}.|{c:past}, but {e:not}.|{e:not} even though {c:past}.|Despite the fact that {c:past}, {e:not}.",
    "whenever": "Whenever {c:present}, {e:present}.|{e:present} whenever {c:present}.|Each time {c:present}, {e:present}.",
    "cause": "{c:past}.|It is true that {c:past}.|The fact is that {c:past}.",
    "why": "{e:why}?|For what reason {e:aux}?|Do you know why {e:past}?|What was the reason why {e:past}?"}



def fill(group: str, **words: str) -> list[str]:
    """Every template of the group with its upper-case slots filled."""
    return [re.sub(r"\b[A-Z]+\b", lambda m: words.get(m[0], m[0]), text) for text in group.split("|")]


def words_of(rng: random.Random, e: Event) -> Words:
    many = isinstance(e.obj, NP) and e.obj.plural
    return Words(render(rng, e.who), e.who.plural, syn(rng, e.verb), render(rng, e.obj) if isinstance(e.obj, NP)
                 else syn(rng, e.obj), many, syn(rng, e.manner), syn(rng, e.place), syn(rng, e.time))


def generic(np: NP, one: str = "a") -> NP:
    """The phrase without reference to one known thing: "the cake" -> "a cake", "the cakes" -> "cakes"."""
    if np.noun.kind == "name":
        return NP(Noun("woman" if NAMES[np.noun.words] == "she" else "man", ""), one)
    if np.noun.kind in "~^":
        return np._replace(det="")
    return np if np.noun.kind == "!" else np._replace(det={"the": one, "the+": "+", "a": one}.get(np.det, np.det))


def as_generic(e: Event) -> Event:
    return e._replace(who=generic(e.who), obj=generic(e.obj) if isinstance(e.obj, NP) else e.obj)


def say_statement(rng: random.Random, sc: Scene) -> list[str]:
    e = sc.event
    w = words_of(rng, e)
    act = f"{w.s} {finite(w.v, e.tense, w.sp, e.neg)} {w.o}"
    texts = [f"{act} {w.m} {w.p} {w.t}"]
    pas = f"{w.o} {finite(w.v, e.tense, w.op, e.neg, True)} by {w.s}"
    if isinstance(e.obj, NP):
        texts += [f"{pas} {w.m} {w.p} {w.t}"] * 2
    if w.t and e.tense != "perfect":
        texts += [f"{w.t}, {act} {w.m} {w.p}"] + [f"{w.t}, {pas} {w.p} {w.m}"] * isinstance(e.obj, NP)
    if w.p and isinstance(e.obj, NP):
        texts.append(f"{w.p}, {act} {w.m} {w.t}")
    if e.neg:
        texts.append(f"it is not true that {w.s} {finite(w.v, e.tense, w.sp)} {w.o} {w.p} {w.t}")
    elif e.who.det != "+":
        texts.append(f"it {'was' if e.tense == 'past' else 'is'} {w.s} {'who' if e.block.human else 'that'} "
                     f"{finite(w.v, e.tense, w.sp)} {w.o} {w.m} {w.p} {w.t}")
    return [sentence(t) for t in texts]


def say_yes_no(rng: random.Random, sc: Scene) -> list[str]:
    e = sc.event
    w = words_of(rng, e)
    tail = f"{w.m} {w.p} {w.t}"
    aux, rest = split_verb(w.v, e.tense, w.sp)
    act = f"{w.s} {finite(w.v, e.tense, w.sp)} {w.o} {tail}"
    texts = [f"{aux} {w.s} {rest} {w.o} {tail}", f"is it true that {act}", f"do you know whether {act}", f"can you tell me if {act}"]
    if isinstance(e.obj, NP):
        aux, rest = split_verb(w.v, e.tense, w.op, True)
        texts.append(f"{aux} {w.o} {rest} by {w.s} {tail}")
    return [sentence(t, "?") for t in texts]


def say_wh(rng: random.Random, sc: Scene) -> list[str]:
    e = sc.event
    w = words_of(rng, e)
    ask = sc.x[0]
    p, t, o = w.p * (ask != "where"), w.t * (ask != "when"), w.o * (ask != "what")
    person = isinstance(e.obj, NP) and e.obj.noun.kind == "*"
    word = {"what": "who" if person else "what", "who": "who" if e.block.human else "what"}.get(ask, ask)
    if ask == "who":
        act = f"{finite(w.v, e.tense, False)} {o} {p} {t}"
        it = "was it" if e.tense == "past" else "is it"
        return [sentence(f"{start} {act}", "?") for start in
                (word, f"{word} {it} that", f"do you know {word}", f"can you tell me {word}")]
    aux, rest = split_verb(w.v, e.tense, w.sp)
    act = f"{w.s} {finite(w.v, e.tense, w.sp)} {o} {p} {t}"
    texts = [f"{word} {aux} {w.s} {rest} {o} {p} {t}", f"do you know {word} {act}", f"can you tell me {word} {act}"]
    if ask == "why":
        texts += [f"for what reason {aux} {w.s} {rest} {o} {p} {t}", f"what is the reason why {act}"]
    if o and isinstance(e.obj, NP):
        aux, rest = split_verb(w.v, e.tense, w.op, True)
        texts.append(f"{word} {aux} {o} {rest} by {w.s} {p} {t}")
    return [sentence(t, "?") for t in texts]


def say_howto(rng: random.Random, sc: Scene) -> list[str]:
    w = words_of(rng, as_generic(sc.event))
    who, job = generic(sc.event.who), sc.x[0] >= len(HOWTO)
    agent = render(rng, who if who.noun.kind == "name" else who._replace(det="a"))
    many = {"V": f"{w.v} {w.o}", "G": f"{inflect(w.v, 'ing')} {w.o}", "A": agent}
    return [sentence(t, "?") for t in fill((HOWTO + JOB_HOWTO)[sc.x[0]], **many)]


def say_caption(rng: random.Random, sc: Scene) -> list[str]:
    e = as_generic(sc.event)
    w = words_of(rng, e)
    be, doing = "are" if w.sp else "is", f"{inflect(w.v, 'ing')} {w.o} {w.p}"
    texts = [f"{w.s} {be} {doing}", f"{w.s} {doing}", f"there {be} {w.s} {doing}", f"{w.s} can be seen {doing}"]
    if isinstance(e.obj, NP):
        texts.append(f"{w.o} {finite(w.v, 'progressive', w.op, passive=True)} by {w.s} {w.p}")
    return [sentence(t) for t in texts]


def say_report(rng: random.Random, sc: Scene) -> list[str]:
    e = sc.event
    w = words_of(rng, e)
    tenses = ("pluperfect", "past") if e.tense == "past" else ("would", "future")
    c, d = (f"{w.s} {finite(w.v, tense, w.sp)} {w.o} {w.p} {w.t}" for tense in tenses)
    return [sentence(t) for t in fill(VIEWS[sc.x[0]], S=render(rng, sc.x[1]), C=c, D=d)]


def say_control(rng: random.Random, sc: Scene) -> list[str]:
    w = words_of(rng, sc.event)
    slots = {"V": f"{w.v} {w.o}", "G": f"{inflect(w.v, 'ing')} {w.o}", "WAS": "were" if w.sp else "was"}
    texts = [f"{w.s} {text} {w.p}" for text in fill(CONTROL[sc.x[0]], **slots)]
    return [sentence(f"{t} {w.t}") for t in texts] + [sentence(f"{w.t}, {t}") for t in texts if w.t]


def say_order(rng: random.Random, sc: Scene) -> list[str]:
    w = words_of(rng, sc.event)
    slots = {"V": f"{w.v} {w.o}", "G": f"{inflect(w.v, 'ing')} {w.o}", "A": w.s, "S": render(rng, sc.x[1]),
             "WAS": "were" if w.sp else "was"}
    return [sentence(f"{t} {w.p}") for t in fill(ORDER[sc.x[0]], **slots)]


def say_instruction(rng: random.Random, sc: Scene) -> list[str]:
    e = sc.event
    w = words_of(rng, e)
    do, limit = sc.x
    v, g = f"{w.v} {w.o} {w.p}", f"{inflect(w.v, 'ing')} {w.o} {w.p}"
    pp = f"{inflect(w.v, 'pp')} {w.p}"
    texts = ([f"please {v}", f"make sure to {v}", f"remember to {v}", f"do not forget to {v}", f"you should {v}",
              f"{w.o} should be {pp}"] if do else
             [f"do not {v}", f"you must not {v}", f"please avoid {g}", f"you should never {v}", f"{w.o} must not be {pp}"])
    return [sentence(f"{t} {syn(rng, limit)}") for t in texts]


def say_sequence(rng: random.Random, sc: Scene) -> list[str]:
    one, two = sc.event, sc.x[0]
    w, u = words_of(rng, one), words_of(rng, two)
    f1, f2 = (f"{inflect(a.v, 'past')} {a.o}" for a in (w, u))
    g1, g2 = (f"{inflect(a.v, 'ing')} {a.o}" for a in (w, u))
    again = NAMES.get(w.s) or ("they" if w.sp else render(rng, one.who._replace(det="the")) if one.block.human else "it")
    return [sentence(t) for t in (
        f"after {g1}, {w.s} {f2} {w.p} {w.t}", f"{w.s} {f1} and then {f2} {w.p} {w.t}",
        f"{w.s} first {f1} and later {f2} {w.p} {w.t}", f"before {g2}, {w.s} {f1} {w.p} {w.t}",
        f"{w.t}{',' * bool(w.t)} {w.s} {f1} {w.p}. After that, {again} {f2}")]


def say_contrast(rng: random.Random, sc: Scene) -> list[str]:
    e = sc.event
    w = words_of(rng, e)
    kind, second = sc.x
    q, f, tail = render(rng, second), finite(w.v, e.tense, w.sp), f"{w.p} {w.t}"
    pas = finite(w.v, e.tense, w.op, passive=True)
    no = split_verb(w.v, e.tense, second.plural, True)[0]
    texts = {"not": [f"{w.s} {f} {w.o} but not {q} {tail}", f"{w.o} {pas} by {w.s} {tail}, but {q} {no} not"],
             "instead": [f"{w.s} {f} {w.o} instead of {q} {tail}", f"instead of {q}, {w.s} {f} {w.o} {tail}",
                         f"{w.s} {f} {w.o} rather than {q} {tail}"],
             "both": [f"{w.s} {f} both {w.o} and {q} {tail}", f"{w.s} {f} {w.o} as well as {q} {tail}",
                      f"{w.o} and {q} {finite(w.v, e.tense, True, passive=True)} by {w.s} {tail}",
                      f"{w.s} {f} not only {w.o} but also {q} {tail}"]}[kind]
    return [sentence(t) for t in texts]


def say_transfer(rng: random.Random, sc: Scene) -> list[str]:
    e = sc.event
    which, receiver, thing = sc.x
    w = words_of(rng, e)
    texts = fill(TRANSFER[which], A=w.s, B=render(rng, receiver), X=render(rng, thing), WAS="were" if receiver.plural else "was")
    return [sentence(f"{t} {w.p} {w.t}") for t in texts] + [sentence(f"{w.t}, {t} {w.p}") for t in texts if w.t]


def say_count(rng: random.Random, sc: Scene) -> list[str]:
    place, thing = syn(rng, sc.event.place), sc.x[0]
    if sc.family == "how-many":
        name = render(rng, thing._replace(det="+"))
        texts = [f"how many {name} are there {place}", f"what is the number of {name} {place}", f"do you know how many {name} there are {place}",
                 f"can you tell me how many {name} are {place}"]
        return [sentence(t, "?") for t in texts]
    name = render(rng, thing)
    return [sentence(t) for t in (f"there are {name} {place}", f"{name} are {place}", f"{place}, there are {name}",
                                  f"{name} can be found {place}", f"you will find {name} {place}")]


def say_phrase(rng: random.Random, sc: Scene) -> list[str]:
    w = words_of(rng, as_generic(sc.event))
    texts = fill(PHRASES[sc.x[0]], A=w.s, V=f"{w.v} {w.o} {w.p}", G=f"{inflect(w.v, 'ing')} {w.o} {w.p}")
    return [re.sub(r"\s+", " ", t).strip() for t in texts]


def say_headline(rng: random.Random, sc: Scene) -> list[str]:
    e = sc.event._replace(who=generic(sc.event.who, ""), obj=generic(sc.event.obj, ""), place=re.sub(r"\bthe ", "", sc.event.place))
    w = words_of(rng, e)
    p = w.p
    texts = [f"{w.s} {inflect(w.v, 'base' if w.sp else 's')} {w.o} {p}", f"{w.o} {inflect(w.v, 'pp')} by {w.s} {p}"]
    return [sentence(re.sub(r"\bthe ", "", t), "") for t in texts]


def say_passage(rng: random.Random, sc: Scene) -> list[str]:
    tails = [syn(rng, TAILS[i]) for i in sc.x]
    return [" ".join((text, *tails)) for text in say_statement(rng, sc)]


def clause(rng: random.Random, text: str, form: str) -> str:
    """One cause or effect ("the oven *be hot") in a tense of split_verb, negated (not) or as a question (aux, why)."""
    subject, mark, verb = re.split(r" ([*+])", expand(rng, text))
    many = mark == "+"
    if form in ("aux", "why"):
        aux, rest = split_verb(verb, "past", many)
        return f"{'why ' * (form == 'why')}{aux} {subject} {rest}"
    return f"{subject} {finite(verb, 'past' if form == 'not' else form, many, form == 'not')}"


def say_cause(rng: random.Random, sc: Scene) -> list[str]:
    cause, effect, time = sc.x
    texts = []
    for template in CAUSAL[sc.family].split("|"):
        text = re.sub(r"\{(\w):(\w+)\}", lambda m: clause(rng, cause if m[1] == "c" else effect, m[2]), template)
        text = f"{syn(rng, time)}{', ' * bool(time)}{text[:-1]}"
        texts.append(re.sub(r"\. \w", lambda m: m[0].upper(), sentence(text, template[-1])))
    return texts


def say_comparison(rng: random.Random, sc: Scene) -> list[str]:
    first, second, adj, degree, tense = sc.x
    a, b = (f"the {syn(rng, group)}" for group in (first, second))
    if sc.family == "which":
        more, be = comparative(adj), "is"
        return [sentence(t, "?") for t in (
            f"which is {more}, {a} or {b}", f"is {a} or {b} {more}", f"which one is {more}: {a} or {b}",
            f"between {a} and {b}, which one is {more}", f"do you know which is {more}, {a} or {b}")]
    more = f"{syn(rng, degree)} {comparative(adj)}"
    texts = [f"{a} {tense} {more} than {b}", f"compared with {b}, {a} {tense} {more}"]
    texts.append(f"{b} {tense} not {'nearly ' * degree.startswith('much')}{'quite ' * degree.startswith('sl')}as {adj} as {a}")
    if adj in ANTONYMS:
        texts.append(f"{b} {tense} {syn(rng, degree)} {comparative(ANTONYMS[adj])} than {a}")
    return [sentence(t) for t in texts]


def say_term(rng: random.Random, sc: Scene) -> list[str]:
    term, gloss = noun(sc.x[0]), expand(rng, sc.x[1])
    be, name = ("are" if term.kind == "^" else "is"), article(term.words) if not term.kind else term.words
    if sc.family == "what-is":
        return [sentence(t, "?") for t in (
            f"what {be} {name}", f'what does the word "{term.words}" mean', f'how would you define "{term.words}"',
            f"can you explain what {name} {be}", f'what is the meaning of "{term.words}"', f"do you know what {name} {be}")]
    if sc.family == "which-word":
        return [sentence(t, "?") for t in (f"what do you call {gloss}", f"what is the word for {gloss}", f"which word describes {gloss}")]
    return [sentence(t) for t in (f"{name} {be} {gloss}", f"{name} can be defined as {gloss}", f'the word "{term.words}" means {gloss}',
                                  f"{gloss} {be} called {name}", f"we call {gloss} {name}")]


class Family(NamedTuple):
    """A construction: how often, its wordings, the event roles a reader sees, and the tenses it takes."""
    weight: float
    say: Callable[[random.Random, Scene], list[str]]
    roles: tuple[str, ...] = ()
    tenses: tuple[str, ...] = ()
    people: bool = False
    transitive: bool = False


ALL = ("who", "verb", "obj", "place", "time", "manner", "neg")
CORE = ("who", "verb", "obj", "place")
FAMILIES = {
    "statement": Family(14, say_statement, ALL, ("past", "past", "progressive", "future")),
    "habit": Family(4, say_statement, ALL[:6], ("present",)),
    "perfect": Family(3, say_statement, ALL[:5], ("perfect",)),
    "negation": Family(4, say_statement, ALL[:5], ("past", "future", "progressive")),
    "yes-no question": Family(6, say_yes_no, ALL[:5], ("past", "future", "progressive")),
    "wh-question": Family(9, say_wh, ALL[:5], ("past", "future")),
    "how-to": Family(8, say_howto, ("verb", "obj"), ("present",), True, True),
    "caption": Family(8, say_caption, CORE, ("progressive",)),
    "reported speech": Family(6, say_report, ALL[:5], ("past", "future")),
    "intention": Family(7, say_control, ALL[:5], ("past",), True),
    "request": Family(6, say_order, CORE, ("past",), True),
    "instruction": Family(5, say_instruction, ("verb", "obj", "place"), ("present",), True, True),
    "sequence": Family(5, say_sequence, ALL[:5], ("past",)),
    "contrast": Family(4, say_contrast, ALL[:5], ("past", "future"), False, True),
    "transfer": Family(5, say_transfer, ("who", "place", "time"), ("past",), True),
    "count": Family(3, say_count, ("place",), ("present",), True),
    "how-many": Family(1, say_count, ("place",), ("present",), True),
    "noun phrase": Family(4, say_phrase, ("verb", "obj", "place"), ("present",), True, True),
    "headline": Family(4, say_headline, CORE, ("present",), False, True),
    "passage": Family(8, say_passage, ALL, ("past",)),
    "if": Family(3, say_cause), "because": Family(4, say_cause), "although": Family(2, say_cause),
    "whenever": Family(2, say_cause), "cause": Family(1, say_cause), "why": Family(2, say_cause),
    "comparison": Family(5, say_comparison), "which": Family(2, say_comparison),
    "definition": Family(1, say_term), "what-is": Family(1, say_term), "which-word": Family(1, say_term)}
ANSWERS = {"wh-question": "statement", "why": "because", "which": "comparison", "what-is": "definition",
           "which-word": "definition", "how-many": "count"}
